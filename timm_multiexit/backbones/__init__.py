"""The CIFAR networks of the EED paper, and smaller ones. Importing this package registers them with timm.

Source: Lee and Lee, arXiv 2104.00299, Tables I and II.

>>> import timm
>>> import timm_multiexit.backbones
>>> model = timm.create_model('cifar_resnet18', num_classes=10)
>>> model.multiexit_preset['head_widths']
[[128, 256, 512], [256, 512], [512]]
"""

from timm_multiexit.backbones import cifar_resnet as cifar_resnet
from timm_multiexit.backbones import cifar_resnet_small as cifar_resnet_small
from timm_multiexit.backbones import cifar_vgg as cifar_vgg
from timm_multiexit.backbones import pyramidnet as pyramidnet
from timm_multiexit.backbones import wide_resnet as wide_resnet
