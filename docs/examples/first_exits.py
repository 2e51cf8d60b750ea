# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Ten lines to first exits
#
# A plain timm network gets exits, is trained for a minute on scikit-learn's handwritten digits, and answers early.

# %%
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import timm_multiexit as tme

torch.manual_seed(0)
model = tme.create_model('resnet18', exits='auto', num_classes=10, in_chans=1)
model.exits

# %% [markdown]
# Three exits, each a small head that reads a stage of the network. The network itself is timm's: `model(x)` returns what
# timm's would. The names below are timm's own names of modules.

# %%
x = torch.randn(2, 1, 32, 32)
outputs = model(x, exits=True)
print([tuple(logits.shape) for logits in outputs.logits])  # shallow to deep, main last

# %% [markdown]
# ## Train them
#
# The images: 1,797 digits of 8 by 8 pixels, enlarged to 32. A fifth is kept for thresholds, a fifth for the report.

# %%
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None] / 8 - 1, size=32, mode='bicubic')
dataset = TensorDataset(images, torch.tensor(digits.target))
train, calib, test = torch.utils.data.random_split(dataset, [0.3, 0.3, 0.4], torch.Generator().manual_seed(0))

# %% [markdown]
# Any loop will do: the model returns all logits with `exits=True`, and a loss takes them.

# %%
criterion = tme.create_loss('eed')  # the mean of all classifiers teaches each of them
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for epoch in range(8):
    for batch, target in DataLoader(train, batch_size=64, shuffle=True):
        loss = criterion(model(batch, exits=True), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
tme.evaluate(model, DataLoader(test, batch_size=64))

# %% [markdown]
# ## Answer early
#
# `calibrate` chooses thresholds on the images that were kept for it. Then an image leaves at the first exit that is sure
# enough, and what lies behind that exit is not computed for it.

# %%
model.calibrate(DataLoader(calib, batch_size=64), budget='70%')  # of the MACs of the network without exits
print(model.policy)

batch, target = next(iter(DataLoader(test, batch_size=len(test))))
prediction = model.infer(batch)
right = prediction.logits.argmax(-1) == target
print(f'{100 * right.float().mean():.1f} % right')
print('left at exit 0, 1, 2, main:', prediction.exit_idx.bincount(minlength=4).tolist())

# %% [markdown]
# ## A picture
#
# What each exit costs and gives, and what the thresholds make of them on images that chose nothing.

# %%
import matplotlib.pyplot as plt

with torch.inference_mode():
    logits = model(batch, exits=True).logits
costs = model.cost()
points = []
for budget in range(40, 101, 10):
    answer = model.infer(batch, budget=f'{budget}%')
    macs = sum(costs[idx].sequential.macs for idx in answer.exit_idx.tolist()) / len(batch)
    points.append((macs / 1e6, 100 * (answer.logits.argmax(-1) == target).float().mean()))

figure, axes = plt.subplots(figsize=(6, 3.5))
axes.plot(*zip(*points), marker='.', label='infer, by budget')
macs = [cost.fixed.macs / 1e6 for cost in costs]
accuracy = [100 * (each.argmax(-1) == target).float().mean() for each in logits]
axes.scatter(macs, accuracy, color='black', zorder=3, label='one classifier alone')
for name, x, y in zip(('exit 0', 'exit 1', 'exit 2', 'main'), macs, accuracy):
    axes.annotate(name, (x, y), xytext=(4, -12), textcoords='offset points')
axes.set(xlabel='MMACs an image', ylabel=f'top-1, % of {len(batch)} test images')
axes.legend()
figure.tight_layout()
