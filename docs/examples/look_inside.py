# %% [markdown]
# # Look into a network
#
# Which images leave where, which were easy, which were hard, and what the exits think of the same image. On
# scikit-learn's digits, with the network of [the first example](first_exits.html).

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import timm_multiexit as tme

torch.manual_seed(0)
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None] / 8 - 1, size=32, mode='bicubic')
train, test = random_split(
    TensorDataset(images, torch.tensor(digits.target)), [0.5, 0.5], torch.Generator().manual_seed(0)
)

model = tme.create_model('cifar_resnet8', exits='auto', num_classes=10, in_chans=1)
epochs, loader, criterion = 12, DataLoader(train, batch_size=32, shuffle=True), tme.create_loss('eed')
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=epochs, steps_per_epoch=len(loader))
for _ in range(epochs):
    for batch, target in loader:
        loss = criterion(model(batch, exits=True), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
model = model.eval()

# %% [markdown]
# ## What every classifier says
#
# All classifiers on all test images, once. Everything below is worked out from these logits: a policy on them gives
# the answers that `model.infer` gives.

# %%
images, target = next(iter(DataLoader(test, batch_size=len(test))))
with torch.inference_mode():
    logits = model(images, exits=True).logits
confidence, answers = torch.stack([each.softmax(-1) for each in logits]).max(-1)  # [3, N] each
names = ['exit 0', 'exit 1', 'main']

policy = tme.ExitPolicy('confidence', (0.9, 0.9))
exit_idx = tme.apply_policy(policy, logits).exit_idx
assert torch.equal(exit_idx, model.infer(images, policy).exit_idx)
for idx, name in enumerate(names):
    there = exit_idx == idx
    right = (answers[idx] == target).float()
    left = f'{int(there.sum())} left here, {100 * right[there].mean():.1f} % of them right'
    print(f'{name}: {100 * right.mean():.1f} % of all right; {left}')

# %% [markdown]
# ## Easiest and hardest
#
# Easiest: the first exit is most confident. Hardest: main is least confident. Below each image is its class, and what
# exit 0, exit 1 and main answer.


# %%
def show(chosen, title):
    figure, axes = plt.subplots(1, len(chosen), figsize=(8, 1.5), layout='constrained')
    figure.suptitle(title, fontsize=10)
    for cell, idx in zip(axes, chosen.tolist()):
        cell.imshow(images[idx, 0], cmap='gray_r')
        said = ' '.join(str(answer.item()) for answer in answers[:, idx])
        cell.set_xlabel(f'{target[idx]}: {said}', fontsize=9)
        cell.set(xticks=[], yticks=[])
    plt.show()


show(confidence[0].argsort(descending=True)[:8], 'easiest')
show(confidence[-1].argsort()[:8], 'hardest')

# %% [markdown]
# ## Which classes leave early
#
# Whether a class is easy depends on what it can be mistaken for.

# %%
counts = torch.zeros(3, 10).index_put_((exit_idx, target), torch.ones(len(target)), accumulate=True)
shares = counts / counts.sum(0)  # [classifier, digit]
figure, axes = plt.subplots(figsize=(6.5, 3), layout='constrained')
for idx, (name, color) in enumerate(zip(names, ('#56b4e9', '#e69f00', '#0072b2'))):
    axes.bar(range(10), 100 * shares[idx], bottom=100 * shares[:idx].sum(0), label=name, color=color)
axes.set(xticks=range(10), xlabel='digit', ylabel='% of its images that leave there')
axes.legend(loc='lower right')
plt.show()

# %% [markdown]
# ## When a deeper answer is a worse one
#
# Images that only one of exit 0 and main has right. Where exit 0 is right and main is not, the network thinks too long
# about it; where main is right and exit 0 is not, thresholds have to keep the image inside.

# %%
early, late = answers[0] == target, answers[-1] == target
print(f'right at exit 0, wrong at main: {int((early & ~late).sum())} of {len(target)}')
print(f'wrong at exit 0, right at main: {int((~early & late).sum())} of {len(target)}')
show((~early & late).nonzero().flatten()[:8], 'wrong at exit 0, right at main')
