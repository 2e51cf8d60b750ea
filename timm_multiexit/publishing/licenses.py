"""The license that weights are published under, which follows from what training started from. Not legal advice."""

import re
from typing import NamedTuple

import timm

from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.card import DATASET_ID, REPO_ID
from timm_multiexit.utils.errors import InvalidValueError, brief

DEFAULT_LICENSE = 'apache-2.0'
_HOW = 'train --hub-license, publish --license, push_to_hub(license=...)'


class License(NamedTuple):
    """A license as a model card names it: by an id of the Hub's list, or as 'other' with name and link.

    `note` is one line on why it is this one.
    """

    id: str
    name: str | None
    link: str | None
    note: str


class Terms(NamedTuple):
    """One row of `LICENSES`; `link` is the address of a license that the Hub does not list.

    Weights derived from 'permissive' ones may be relicensed, from 'non-commercial' and 'vendor' ones they keep the
    license; the terms of 'unclear' ones are unknown.
    """

    kind: str
    link: str | None = None


# All licenses in the registry of timm 1.0.31. Links are from timm's sources and the repositories they name.
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
    """Return the license to publish weights under, `asked` if the publisher may choose it.

    `source` is the license of the base weights, which training started from (`pretrained_cfg['license']` of timm), and
    `base` their repository; None for both if they were trained from scratch.

    Raises:
        InvalidValueError: Unknown license of the base weights and none given, one that must be kept and another given,
            or no such license.

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
    start = f'the base weights ({base})' if base else 'the base weights'
    kind = _find_kind(source)
    if source is None or kind == 'unclear':
        if asked is None:
            raise InvalidValueError(
                f'The license of {start} is {source or "unknown"}: look it up and give it by {_HOW}.'
            )
        return _make(asked, f'Chosen by the publisher; the license of {start} is unknown.')
    if asked in (None, source):
        limits = {'permissive': '', 'vendor': ', which applies to derived weights'}
        note = limits.get(kind, ', which applies to derived weights and forbids commercial use')
        return _make(source, f'That of {start}{note}.', None if kind == 'permissive' else base)
    if kind == 'permissive':
        return _make(asked, f'Chosen by the publisher; {start} are licensed {source}, whose notice must be kept.')
    raise InvalidValueError(
        f'License must be {source}, under which {start} are licensed and which derived weights keep, got {asked}.'
    )


def _normalize(text: str | None) -> str | None:
    # One short line: the text may come from anyone's config.json.
    return ' '.join((text or '').lower().split())[:100] or None


def _find_kind(license_id: str | None) -> str:
    if license_id in LICENSES:
        return LICENSES[license_id].kind
    # The cautious choice for licenses that are not in the table: keep them.
    return 'non-commercial' if str(license_id).startswith('cc-by-nc') else 'vendor'


def _check_asked(asked: str, source: str | None) -> None:
    named = [name for name, terms in LICENSES.items() if name and terms.link]
    if asked not in HUB_IDS and asked not in named and asked != source or asked in ('other', 'unknown'):
        raise InvalidValueError(
            'License must be one of https://huggingface.co/docs/hub/repositories-licenses or of'
            f' {", ".join(named)}, got {brief(asked)}.'
        )


def _make(license_id: str, note: str, base: str | None = None) -> License:
    """Return a license by its id, or by name and link where the Hub does not list it."""
    if license_id in HUB_IDS:
        return License(license_id, None, None, note)
    link = LICENSES[license_id].link if license_id in LICENSES else None
    if link is None and base and re.fullmatch(r'[\w.-]+/[\w.-]+', base, re.ASCII):
        link = f'https://huggingface.co/{base}'
    if link is None or not re.fullmatch(r'[a-z0-9][a-z0-9._-]{0,63}', license_id):
        raise InvalidValueError(
            f'The license of the base weights, {brief(license_id)}, is known neither to the Hub nor to timm: set one of'
            " the Hub's list as 'license' in the pretrained_cfg of their config.json."
        )
    return License('other', license_id, link, note)


class PublicationInfo(NamedTuple):
    """What the publisher says about a run: license of the weights, repositories of the base weights and the data set.

    None for what `resolve_license` derives and the run has recorded. `dataset_note` is how the images differ from
    those of the data set: they may be smaller, or compressed anew.
    """

    license: str | None = None
    base_model: str | None = None
    dataset_id: str | None = None
    dataset_note: str | None = None


NO_INFO = PublicationInfo()


def find_license(origin: Origin, info: PublicationInfo = NO_INFO) -> tuple[str | None, License]:
    """Return the repository of the base weights, None for none, and the license that follows.

    Raises:
        InvalidValueError: Malformed name of a repository, or see `resolve_license`.
    """
    for what, name, pattern in (('Base model', info.base_model, REPO_ID), ('Data set', info.dataset_id, DATASET_ID)):
        if name is not None and not pattern.fullmatch(name):
            raise InvalidValueError(f'{what} must be the name of a repository, ORG/NAME, got {brief(name)}.')
    if info.base_model:
        origin = Origin(info.base_model, _license_of(info.base_model, origin))
    return origin.repository, resolve_license(origin.license, asked=info.license, base=origin.base)


def _license_of(base_model: str, origin: Origin) -> str | None:
    """Return the license of weights that are said to be the base: of timm's by its registry, else as loaded from there.

    That of a folder or a file goes with the base that it is said to be of; that of another repository does not.
    """
    owner, _, name = base_model.partition('/')
    cfg = timm.models.get_pretrained_cfg(name) if owner == 'timm' else None
    if cfg is not None and cfg.license:
        return cfg.license
    return origin.license if origin.repository in (None, base_model) else None
