"""Publishes a run, lists the repository and loads it, in a process of its own; the last line is JSON of what it saw."""

import importlib.util
import json
import sys

import safetensors.torch
import timm
import torch
from huggingface_hub import HfApi

import timm_multiexit as tme

torch.set_num_threads(1)  # as in the tests: more of them add in another order


def main(script, run, repo_id, expected):
    spec = importlib.util.spec_from_file_location('publish', script)
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    if publish.main([run, repo_id, '--yes']):
        return 1
    tensors = safetensors.torch.load_file(expected)
    images = tensors.pop('images')
    model = tme.create_model(f'hf-hub:{repo_id}', pretrained=True).eval()
    plain = timm.create_model(f'hf-hub:{repo_id}', pretrained=True).eval()
    with torch.inference_mode():
        logits = model(images, exits=True).logits
        is_plain_equal = torch.equal(plain(images), logits[-1])
    is_equal = [torch.equal(one, tensors[str(idx)]) for idx, one in enumerate(logits)]
    seen = {'files': HfApi().list_repo_files(repo_id), 'is_equal': is_equal, 'is_plain_equal': is_plain_equal}
    print(json.dumps({**seen, 'commit': model.hub_commit}))
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
