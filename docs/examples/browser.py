# %% [markdown]
# # Deploy to the browser
#
# The photo network of this repository becomes ONNX programs that stop early without Python, and a web page that runs
# them.

# %%
import timm_multiexit as tme

model = tme.create_model('local-dir:hub/checkpoints/imagenette_lite0_eed', pretrained=True).eval()
tme.export(model, 'output/docs/net', forms=['stages'])

# %% [markdown]
# One program per stage, which gives the logits of its exit and the state that the next one takes. The shell command
# is `timm-multiexit export hub/checkpoints/imagenette_lite0_eed --output output/docs/net --forms stages`.

# %%
from pathlib import Path

for path in sorted(Path('output/docs/net').rglob('*.*')):
    print(f'{path.stat().st_size / 1e6:6.2f} MB  {path}')

# %% [markdown]
# ## Without torch
#
# `runner.py` in the folder needs numpy and ONNX Runtime alone. Three drawings, each as far as the budget of the
# network's own policy wants it:

# %%
import sys

sys.path.insert(0, 'output/docs/net')
from runner import Runner

runner = Runner('output/docs/net')
photos = sorted(Path('hub/space/examples').rglob('*.jpg'))
for photo in photos:
    logits, exit_idx = runner.infer(runner.preprocess(photo))
    print(f'{photo.stem:10} {runner.classes[logits[0].argmax()]:10} left at exit {exit_idx[0]}')

# %% [markdown]
# ## The page
#
# `hub/space/make.py` writes a folder of static files: the programs, ONNX Runtime Web, which npm installs at the first
# call, and the drawings as examples. It needs no server of its own and asks no other host for anything, so it is a
# static Space of the Hugging Face Hub as it is.

# %%
import subprocess

command = [
    sys.executable,
    'hub/space/make.py',
    'output/docs/net',
    'output/docs/page',
    '--examples',
    'hub/space/examples',
]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# Open it with `python -m http.server --bind 127.0.0.1 --directory output/docs/page`. Each exit shows its answer as it
# is computed, and a slider moves the threshold:
#
# ![The demo page: a photo, the answer of each exit, and where the policy stops](../images/page-photos.webp)
#
# (The picture is of the page of a smaller network, at 64 pixels.)
#
# More forms, int8, other runtimes: [Deploy](../deploy.html).
