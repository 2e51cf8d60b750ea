"""What weights started from, as a model, its `config.json` and a run remember it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """The weights that training started from.

    Attributes:
        base: Their repository, 'timm/NAME.TAG' or ORG/NAME, else 'a file' or 'a folder'; None if from scratch.
        license: Their license, None if unknown.
        commit: Of the Hub's repository that the model was created from; None if from elsewhere.
    """

    base: str | None = None
    license: str | None = None
    commit: str | None = None

    @property
    def repository(self) -> str | None:
        """The repository, None where there is none."""
        return self.base if self.base and '/' in self.base else None

    def to_dict(self) -> dict[str, str | None]:
        """Return what files say; those without a commit are as they were before there was one.

        >>> Origin('org/net', 'mit').to_dict(), Origin('org/net', 'mit', 'c0ffee').to_dict()
        ({'base': 'org/net', 'license': 'mit'}, {'base': 'org/net', 'license': 'mit', 'commit': 'c0ffee'})
        """
        return {name: value for name, value in self._asdict().items() if name != 'commit' or value is not None}


def find_origin(pretrained_cfg: Mapping[str, Any], *, pretrained: bool, has_file: bool = False) -> Origin:
    """Return what a model of timm's registry started from, with or without a checkpoint file loaded over its weights.

    The configuration is that of the created model: what timm resolved the name, old or new, and all keywords to.

    >>> import timm
    >>> find_origin(timm.get_pretrained_cfg('resnet18.fb_swsl_ig1b_ft_in1k').to_dict(), pretrained=True)
    Origin(base='timm/resnet18.fb_swsl_ig1b_ft_in1k', license='cc-by-nc-4.0', commit=None)
    >>> find_origin({'license': 'mit'}, pretrained=False)
    Origin(base=None, license=None, commit=None)
    """
    if has_file or (pretrained and pretrained_cfg.get('file')):
        return Origin('a file')
    if not pretrained or not any(pretrained_cfg.get(key) for key in ('hf_hub_id', 'url', 'state_dict')):
        return Origin()  # without a place of weights timm warns and trains from scratch
    # Those from `hf-hub:` names are noted as ORG/NAME@COMMIT.
    repository, _, commit = (pretrained_cfg.get('hf_hub_id') or 'timm/').partition('@')
    if repository.endswith('/'):
        repository += '.'.join(filter(None, (pretrained_cfg.get('architecture'), pretrained_cfg.get('tag'))))
    return Origin(repository, pretrained_cfg.get('license'), commit or None)
