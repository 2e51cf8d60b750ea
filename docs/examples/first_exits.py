# %% [markdown]
# # Ten lines to first exits
#
# A network gets exits, learns scikit-learn's handwritten digits in a minute, and answers early.

# %%
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import timm_multiexit as tme

torch.manual_seed(0)
model = tme.create_model('cifar_resnet8', exits='auto', num_classes=10, in_chans=1)  # or any name that timm knows
print(model.exits)

# %% [markdown]
# Two exits, each a small head that reads a stage of the network. `model(x)` returns what the network without exits
# would, and `exits=True` the logits of all classifiers, shallow to deep, main last.

# %%
outputs = model(torch.randn(8, 1, 32, 32), exits=True)
print([tuple(logits.shape) for logits in outputs.logits])

# %% [markdown]
# ## Train
#
# The images are 1,797 digits of 8 by 8 pixels, enlarged to 32. Half of them are trained on, a fifth chooses
# thresholds below, and the rest is reported.

# %%
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None] / 8 - 1, size=32, mode='bicubic')
dataset = TensorDataset(images, torch.tensor(digits.target))
train, calib, test = random_split(dataset, [0.5, 0.2, 0.3], torch.Generator().manual_seed(0))

# %%
epochs, loader = 12, DataLoader(train, batch_size=32, shuffle=True)
criterion = tme.create_loss('eed')  # the mean of all classifiers teaches each of them
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=epochs, steps_per_epoch=len(loader))
for _ in range(epochs):
    for batch, target in loader:
        loss = criterion(model(batch, exits=True), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

model.eval()
print(tme.evaluate(model, DataLoader(test, batch_size=64)))

# %% [markdown]
# *Fixed* is the cost of an exit alone (`model(x, exit_idx=0)`), *sequential* includes the heads on the way; `ens` is
# the mean of all. The deeper the better, yet most images need no more than the first exit.
#
# ## Answer early
#
# `calibrate` chooses thresholds on the images that were kept for it. An image leaves at the first exit that is sure
# enough, and what lies behind is not computed for it.

# %%
model.calibrate(DataLoader(calib, batch_size=64), budget='70%')  # of the MACs of the network without exits

batch, target = next(iter(DataLoader(test, batch_size=len(test))))
prediction = model.infer(batch)
right = prediction.logits.argmax(-1) == target
print(f'{100 * right.float().mean():.1f} % right; left at exit 0, 1, main: {prediction.exit_idx.bincount().tolist()}')

# %% [markdown]
# ## What a threshold is worth
#
# `calibrate` searched for two numbers. One for both exits shows the range: the higher, the fewer images leave early.

# %%
import matplotlib.pyplot as plt

costs = model.cost((1, 32, 32))
main = costs[-1].fixed.macs
points = []
for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0):
    answer = model.infer(batch, threshold=threshold)
    macs = sum(costs[idx].sequential.macs for idx in answer.exit_idx.tolist()) / len(batch)
    points.append((100 * macs / main, 100 * (answer.logits.argmax(-1) == target).float().mean()))

with torch.inference_mode():
    accuracy = [100 * (logits.argmax(-1) == target).float().mean() for logits in model(batch, exits=True).logits]

figure, axes = plt.subplots(figsize=(6, 3.5), layout='constrained')
axes.plot(*zip(*points), marker='.', label='infer, thresholds 0.3 to 1')
axes.plot([100 * cost.fixed.macs / main for cost in costs], accuracy, 'ks', label='exit 0, exit 1, main alone')
axes.set(xlabel='MACs, % of main alone', ylabel=f'top-1, % of {len(batch)} test images')
axes.legend()
plt.show()
