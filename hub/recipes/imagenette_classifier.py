#!/usr/bin/env python3
"""Write a network from ImageNet with its classifier's rows for Imagenette: `imagenette_classifier.py MODEL FOLDER`.

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', metavar='MODEL', help='timm name, with weights of the 1,000 classes of ImageNet')
    parser.add_argument('folder', metavar='FOLDER', help='is written')
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True)
    if model.num_classes != 1000:
        parser.error(f'MODEL must have the 1,000 classes of ImageNet, got {args.model} with {model.num_classes}.')
    rows = list(CLASSES.values())
    weight, bias = model.get_classifier().weight[rows], model.get_classifier().bias[rows]
    model.reset_classifier(len(rows))
    model.get_classifier().weight.copy_(weight)
    model.get_classifier().bias.copy_(bias)
    config = {'num_classes': len(rows), 'label_names': list(CLASSES)}
    save_for_hf(model, args.folder, model_config=config, safe_serialization=True)


if __name__ == '__main__':
    main()
