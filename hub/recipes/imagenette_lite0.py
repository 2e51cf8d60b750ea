#!/usr/bin/env python3
"""Write tf_efficientnet_lite0 with the rows of its classifier for Imagenette: `imagenette_lite0.py FOLDER`.

FOLDER becomes a timm folder, whose network answers as the one from ImageNet does where only these classes are possible.
"""

import argparse

import timm
import torch
from timm.models import save_for_hf

# Imagenette's class -> ImageNet's index, in the order of a folder of images.
CLASSES = {
    'cassette_player': 482,
    'chain_saw': 491,
    'church': 497,
    'english_springer': 217,
    'french_horn': 566,
    'garbage_truck': 569,
    'gas_pump': 571,
    'golf_ball': 574,
    'parachute': 701,
    'tench': 0,
}


@torch.no_grad()
def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', metavar='FOLDER', help='folder to write')
    args = parser.parse_args()
    model = timm.create_model('tf_efficientnet_lite0', pretrained=True)
    rows = list(CLASSES.values())
    weight, bias = model.classifier.weight[rows], model.classifier.bias[rows]
    model.reset_classifier(len(rows))
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)
    config = {'num_classes': len(rows), 'label_names': list(CLASSES)}
    save_for_hf(model, args.folder, model_config=config, safe_serialization=True)


if __name__ == '__main__':
    main()
