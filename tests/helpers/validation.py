"""Arguments of validate.py, and validators made of them."""

from accelerate import Accelerator
from timm.data import resolve_data_config

from timm_multiexit.cli.flags.validate_args import create_validate_parser, resolve_data
from timm_multiexit.cli.validate import build_validator

DATA_CONFIG = {
    'input_size': (3, 32, 32),
    'mean': (0.5,) * 3,
    'std': (0.5,) * 3,
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
}


def parse(*flags):
    """Return arguments as validate.py has them when it begins: the digits' test split if no data is named."""
    args = create_validate_parser().parse_args([*flags, '--workers', '0'])
    resolve_data(args)
    return args


def make_validator(args, model, config=None, **kwargs):
    config = config or resolve_data_config(vars(args), model=model)
    return build_validator(args, model, config, Accelerator(), **kwargs)
