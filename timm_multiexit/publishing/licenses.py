"""What weights started from, and the license that they are published under for that reason. No legal advice."""

import re
from typing import NamedTuple

from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.card import DATASET_ID, REPO_ID
from timm_multiexit.utils.errors import MultiExitError, brief

DEFAULT_LICENSE = 'apache-2.0'

_HOW = 'train.py --hub-license, hub/publish.py --license, push_to_hub(license=...)'


class License(NamedTuple):
    """A license as a model card names it.

    Attributes:
        id: Of the Hub's list; 'other' for one that the Hub does not list, which has name and link.
        name: What an 'other' license is called; else None.
        link: Where an 'other' license can be read; else None.
        note: One line on why it is this one.
    """

    id: str
    name: str | None
    link: str | None
    note: str


class Terms(NamedTuple):
    """One row of `LICENSES`.

    Attributes:
        kind: 'permissive': weights derived from it may take another license; 'non-commercial' and 'vendor': they keep
            this one; 'unclear': nobody says what is allowed.
        link: Where it can be read, for a license that the Hub does not list.
    """

    kind: str
    link: str | None = None


# All that timm 1.0.31 has in its registry. Links are those of timm's sources and of the repositories they name.
LICENSES: dict[str | None, Terms] = {
    'apache-2.0': Terms('permissive'),
    'bsd-3-clause': Terms('permissive'),
    'cc-by-4.0': Terms('permissive'),
    'mit': Terms('permissive'),
    'apple-amlr': Terms('non-commercial'),  # "research purposes"
    'cc-by-nc-4.0': Terms('non-commercial'),
    'fair-noncommercial-research-license': Terms('non-commercial'),
    'seer-license': Terms(
        'non-commercial', 'https://github.com/facebookresearch/vissl/blob/main/projects/SEER/MODEL_LICENSE.md'
    ),
    'apple-ascl': Terms('vendor'),
    'cvnets-license': Terms('vendor', 'https://github.com/apple/ml-cvnets/blob/main/LICENSE'),
    'dinov3-license': Terms('vendor', 'https://ai.meta.com/resources/models-and-libraries/dinov3-license/'),
    'fastvit-license': Terms('vendor', 'https://github.com/apple/ml-fastvit/blob/main/LICENSE'),
    'gemma': Terms('vendor'),
    'mobileone-license': Terms('vendor', 'https://github.com/apple/ml-mobileone/blob/main/LICENSE'),
    'nvidia-open-model-license': Terms(
        'vendor', 'https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/'
    ),
    'qwen-community-1.0': Terms('vendor', 'https://huggingface.co/Qwen/Qwen3.8-Flash-Next/blob/main/LICENSE'),
    'sapiens2-license': Terms('vendor', 'https://github.com/facebookresearch/sapiens2/blob/main/LICENSE.md'),
    'other': Terms('unclear'),
    'unknown': Terms('unclear'),
    None: Terms('unclear'),
}

# The Hub's list without 'unknown' and 'other': huggingface/hub-docs@242f4a1:docs/hub/repositories-licenses.md
HUB_IDS = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma
    """.split()
)


def resolve_license(source: str | None, *, asked: str | None = None, base: str | None = None) -> License:
    """Return the license to publish weights under.

    Args:
        source: License of the weights that training started from (`pretrained_cfg['license']` of timm); None with no
            `base` either: trained from scratch.
        asked: The license that the publisher wants.
        base: Repository of the weights that training started from.

    Raises:
        MultiExitError: The weights that training started from have no known license and none is asked for, or one that
            cannot be replaced and another is asked for; or there is no such license.

    >>> resolve_license('mit', base='timm/repvgg_a0.rvgg_in1k')[:3]
    ('mit', None, None)
    >>> resolve_license('dinov3-license')[:2]
    ('other', 'dinov3-license')
    """
    source, asked = _normalize(source), _normalize(asked)
    if asked is not None:
        _check_asked(asked, source)
    if source is None and base is None:
        why = 'chosen by the publisher' if asked else 'the default of timm_multiexit'
        return _make(asked or DEFAULT_LICENSE, f'Trained from scratch; the license is {why}.')
    start = f'the weights that training started from ({base})' if base else 'the weights that training started from'
    kind = _find_kind(source)
    if kind == 'unclear':
        if asked is None:
            raise MultiExitError(
                f'The license of {start} is {source or "not given"}: find out what it is and name it: {_HOW}.'
            )
        return _make(asked, f'Chosen by the publisher; {start} come without a known license.')
    if kind == 'permissive':
        if asked in (None, source):
            return _make(source, f'That of {start}.')
        return _make(asked, f'Chosen by the publisher; {start} are licensed {source}, whose notice is to be kept.')
    if asked not in (None, source):
        raise MultiExitError(
            f'The license {asked} was asked for, {start} are licensed {source}, which what is derived from them keeps:'
            f' ask for none, or for {source}.'
        )
    limits = ' and forbids commercial use' if kind == 'non-commercial' else ''
    return _make(source, f'That of {start}, which is passed on with them{limits}.', base)


def _normalize(text: str | None) -> str | None:
    # One line, and a short one: the text may be of anybody's config.json.
    return ' '.join((text or '').lower().split())[:100] or None


def _find_kind(license_id: str | None) -> str:
    if license_id in LICENSES:
        return LICENSES[license_id].kind
    # What is not in the table is kept as it is, the careful choice.
    return 'non-commercial' if license_id.startswith('cc-by-nc') else 'vendor'


def _check_asked(asked: str, source: str | None) -> None:
    named = [name for name, terms in LICENSES.items() if terms.link]
    if asked not in HUB_IDS and asked not in named and asked != source or asked in ('other', 'unknown'):
        raise MultiExitError(
            f'The license {brief(asked)} is unknown: allowed are those of'
            f' https://huggingface.co/docs/hub/repositories-licenses and {", ".join(named)}.'
        )


def _make(license_id: str, note: str, base: str | None = None) -> License:
    """Return a license by its id, or by name and link where the Hub does not list it."""
    if license_id in HUB_IDS:
        return License(license_id, None, None, note)
    link = LICENSES[license_id].link if license_id in LICENSES else None
    if link is None and base and re.fullmatch(r'[\w.-]+/[\w.-]+', base, re.ASCII):
        link = f'https://huggingface.co/{base}'
    if link is None or not re.fullmatch(r'[a-z0-9][a-z0-9._-]{0,63}', license_id):
        raise MultiExitError(
            f'The license of the weights that training started from is {brief(license_id)}, which is known neither to'
            " the Hub nor to timm: name one of the Hub's list as 'license' in the pretrained_cfg of their config.json."
        )
    return License('other', license_id, link, note)


class Labels(NamedTuple):
    """What a run does not know of itself.

    Attributes:
        license: Asked for; None for what the rules of `resolve_license` give.
        base_model: Repository of the weights that training started from; None for what the run knows of them.
        dataset_id: Repository of the data set on the Hub.
    """

    license: str | None = None
    base_model: str | None = None
    dataset_id: str | None = None


NO_LABELS = Labels()


def find_license(origin: Origin, labels: Labels = NO_LABELS) -> tuple[str | None, License]:
    """Return the repository that weights started from, None for none, and the license that follows.

    Raises:
        MultiExitError: A label is no name of a repository; or see `resolve_license`.
    """
    for what, name, pattern in (
        ('The base model', labels.base_model, REPO_ID),
        ('The data set', labels.dataset_id, DATASET_ID),
    ):
        if name is not None and not pattern.fullmatch(name):
            raise MultiExitError(f'{what} is {brief(name)}, allowed is the name of a repository, ORG/NAME.')
    if labels.base_model:
        origin = Origin(labels.base_model, origin.license)
    return origin.repository, resolve_license(origin.license, asked=labels.license, base=origin.base)
