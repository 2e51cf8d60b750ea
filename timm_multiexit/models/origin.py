"""Origin."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """The weights that training started from.

    Attributes:
        base: Their repository, 'timm/NAME.TAG' or ORG/NAME, else 'a file' or 'a folder'; None: none, from scratch.
        license: Theirs; None where it is not known.
    """

    base: str | None = None
    license: str | None = None

    @property
    def repository(self) -> str | None:
        """The repository, None where there is none."""
        return self.base if self.base and '/' in self.base else None


def find_origin(pretrained_cfg: Mapping[str, Any], *, pretrained: bool, has_file: bool = False) -> Origin:
    """Return what a model of timm's registry started from.

    Args:
        pretrained_cfg: Of the model that was made: what timm took a name, old or new, and all keywords to mean.
        pretrained: Whether weights were loaded.
        has_file: Whether a file's took their place.

    >>> import timm
    >>> find_origin(timm.get_pretrained_cfg('resnet18.fb_swsl_ig1b_ft_in1k').to_dict(), pretrained=True)
    Origin(base='timm/resnet18.fb_swsl_ig1b_ft_in1k', license='cc-by-nc-4.0')
    >>> find_origin({'license': 'mit'}, pretrained=False)
    Origin(base=None, license=None)
    """
    if has_file or (pretrained and pretrained_cfg.get('file')):
        return Origin('a file')
    if not pretrained or not any(pretrained_cfg.get(key) for key in ('hf_hub_id', 'url', 'state_dict')):
        return Origin()  # without a place of weights timm warns and starts from scratch
    repository = pretrained_cfg.get('hf_hub_id') or 'timm/'
    if repository.endswith('/'):
        repository += '.'.join(filter(None, (pretrained_cfg.get('architecture'), pretrained_cfg.get('tag'))))
    return Origin(repository, pretrained_cfg.get('license'))
