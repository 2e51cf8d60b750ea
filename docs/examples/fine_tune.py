# %% [markdown]
# # Fine-tune and calibrate
#
# A pretrained network gets exits, is fine-tuned on a folder of images, and its thresholds are chosen for a budget.
#
# This page is built without a network, so the images are what there is offline: two photos of scikit-learn and three
# drawings of this repository, cut into 500 tiles of 40 by 40 pixels. The task is to say which picture a tile is from.
# Some tiles show nothing but sky, which is what makes an image hard. The numbers below say nothing about photos at
# large: put your own folder in the place of `IMAGES`.

# %%
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

IMAGES = Path('output/docs/tiles')  # train/CLASS/*.png, calib/CLASS/*.png, val/CLASS/*.png

pictures = {path.stem: Image.open(path) for path in Path('hub/space/examples').rglob('*.jpg')}
pictures |= dict(zip(('china', 'flower'), map(Image.fromarray, load_sample_images().images)))
splits = np.random.default_rng(0).permutation(['train'] * 40 + ['calib'] * 30 + ['val'] * 30)
for name, picture in pictures.items():
    for idx, split in enumerate(splits):
        path = IMAGES / split / name / f'{idx}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        left, top = 40 * (idx % 10), 40 * (idx // 10)
        picture.crop((left, top, left + 40, top + 40)).save(path)

# %% [markdown]
# ## The network
#
# With a connection, `timm.create_model('tf_efficientnet_lite0', pretrained=True, num_classes=5)` starts from
# ImageNet. Here the weights are those of a network that the repository ships. New exits on a backbone of any kind:

# %%
import timm
import torch

import timm_multiexit as tme

torch.manual_seed(0)
size = (3, 64, 64)
backbone = timm.create_model('local-dir:hub/checkpoints/imagenette_lite0_eed', pretrained=True, num_classes=5)
model = tme.attach_exits(backbone, 'auto', input_size=size)
print(model.exits)

# %% [markdown]
# ## The data
#
# timm's own data set and transforms, those that the network was trained with.

# %%
from torch.utils.data import DataLoader

config = timm.data.resolve_data_config({'input_size': size}, model=backbone)
evaluating = timm.data.create_transform(**config)
augmenting = timm.data.create_transform(**config, is_training=True, scale=(0.5, 1.0), auto_augment=None)


def load(split, transform, **kwargs):
    return DataLoader(timm.data.create_dataset('', str(IMAGES / split), transform=transform), batch_size=25, **kwargs)


train, calib, val = load('train', augmenting, shuffle=True), load('calib', evaluating), load('val', evaluating)
names = list(val.dataset.reader.class_to_idx)
print(len(train.dataset), len(calib.dataset), len(val.dataset), names)

# %% [markdown]
# ## Fine-tune
#
# Heads are new and the backbone is not, so the heads first train alone for an epoch; then all, with a low rate.
# `train.py --pretrained` does the same by default.

# %%
criterion = tme.create_loss('eed')


def train_epochs(epochs, lr):
    optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr)
    for _ in range(epochs):
        for images, target in train:
            loss = criterion(model(images, exits=True), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


model.train()
model.freeze_backbone(trains_classifier=True)
train_epochs(1, lr=3e-3)
model.freeze_backbone(False)
train_epochs(3, lr=1e-3)
model.eval()
print(tme.evaluate(model, val))

# %% [markdown]
# ## Calibrate
#
# Thresholds for a budget, from tiles that are not reported, and what they give on those that are. After so few images
# main need not be the best classifier; leaving early then costs nothing.

# %%
model.calibrate(calib, budget='40%')  # of the MACs of the network without exits

images, target = (torch.cat(part) for part in zip(*val))
costs = model.cost()


def report(name, exit_idx, logits):
    macs = sum(costs[idx].sequential.macs for idx in exit_idx.tolist()) / len(exit_idx)
    right = (logits.argmax(-1) == target).float().mean()
    print(f'{name:6} {100 * right:5.1f} % right, {100 * macs / costs[-1].fixed.macs:5.1f} % of the MACs')


for budget in ('25%', '30%', '35%', '40%', '50%'):
    answer = model.infer(images, budget=budget)
    report(budget, answer.exit_idx, answer.logits)
with torch.inference_mode():
    print(f'main   {100 * (model(images).argmax(-1) == target).float().mean():5.1f} % right, 100.0 % of the MACs')

# %% [markdown]
# ## Where they left
#
# The policy of 40 %: some tiles for each place where images leave, with what was answered. Wrong answers are red.

# %%
import matplotlib.pyplot as plt

prediction = model.infer(images)
paths = val.dataset.filenames(absolute=True)
exits = ['exit 0', 'exit 1', 'exit 2', 'main']
figure, axes = plt.subplots(len(exits), 8, figsize=(8, 5), layout='constrained')
for row, (name, cells) in enumerate(zip(exits, axes)):
    there = (prediction.exit_idx == row).nonzero().flatten().tolist()
    cells[0].set_title(f'{name}: {len(there)} of {len(images)}', loc='left', fontsize=9)
    for cell in cells:
        cell.axis('off')
    for cell, idx in zip(cells, there[:: max(1, len(there) // 8)]):
        answer = prediction.logits[idx].argmax()
        cell.imshow(Image.open(paths[idx]))
        cell.text(0, 47, names[answer], fontsize=8, color='black' if answer == target[idx] else 'red')
plt.show()

# %% [markdown]
# ## Keep it
#
# The folder has weights, exits, class names, the policy and all budgets. Plain timm loads the main network of it.

# %%
tme.save_pretrained(model, 'output/docs/tile-model', label_names=names)
plain = timm.create_model('local-dir:output/docs/tile-model', pretrained=True)
print(type(plain))
