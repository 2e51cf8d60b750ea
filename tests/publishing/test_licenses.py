"""Licenses: what weights are derived from decides, and every license string of timm is decided on."""

from collections import Counter

import pytest
import timm

from timm_multiexit.models.origin import Origin
from timm_multiexit.publishing.licenses import HUB_IDS, LICENSES, PublicationInfo, find_license, resolve_license
from timm_multiexit.utils.errors import MultiExitError

# By hand from timm 1.0.31 and the Hub's list: (id, name) on the card, and whether --license may say otherwise.
EXPECTED = {
    'apache-2.0': ('apache-2.0', None, True),
    'mit': ('mit', None, True),
    'bsd-3-clause': ('bsd-3-clause', None, True),
    'cc-by-4.0': ('cc-by-4.0', None, True),
    'cc-by-nc-4.0': ('cc-by-nc-4.0', None, False),
    'apple-amlr': ('apple-amlr', None, False),
    'apple-ascl': ('apple-ascl', None, False),
    'gemma': ('gemma', None, False),
    'fair-noncommercial-research-license': ('fair-noncommercial-research-license', None, False),
    'seer-license': ('other', 'seer-license', False),
    'cvnets-license': ('other', 'cvnets-license', False),
    'dinov3-license': ('other', 'dinov3-license', False),
    'fastvit-license': ('other', 'fastvit-license', False),
    'mobileone-license': ('other', 'mobileone-license', False),
    'nvidia-open-model-license': ('other', 'nvidia-open-model-license', False),
    'qwen-community-1.0': ('other', 'qwen-community-1.0', False),
    'sapiens2-license': ('other', 'sapiens2-license', False),
}
BASE = 'timm/some_model.in1k'


def test_every_pretrained_configuration_of_timm_is_resolved_or_refused():
    names = timm.list_models(include_tags=True, exclude_filters='cifar_*')
    found = Counter()
    for name in names:
        source = timm.get_pretrained_cfg(name).license
        try:
            license_ = resolve_license(source, base=BASE)
        except MultiExitError:
            found['refused'] += 1
            assert source in (None, 'unknown')
        else:
            assert license_[:2] == EXPECTED[source][:2]
            found[license_.id] += 1
    if timm.__version__ == '1.0.31':
        assert found == {
            'apache-2.0': 1533,
            'mit': 229,
            'cc-by-nc-4.0': 88,
            'bsd-3-clause': 49,
            'other': 18 + 16 + 14 + 12 + 7 + 5 + 5 + 3,
            'apple-ascl': 22,
            'apple-amlr': 11,
            'fair-noncommercial-research-license': 6,
            'cc-by-4.0': 5,
            'gemma': 1,
            'refused': 17 + 11,
        }
    assert sum(found.values()) == len(names) > 2000


def test_the_table_has_what_timm_has():
    assert set(LICENSES) == {*EXPECTED, 'other', 'unknown', None}


@pytest.mark.parametrize('source', EXPECTED)
def test_only_permissive_licenses_can_be_replaced(source):
    other = 'mit' if source != 'mit' else 'apache-2.0'
    if EXPECTED[source][2]:
        license_ = resolve_license(source, asked=other, base=BASE)
        assert license_[:3] == (other, None, None)
        assert f'licensed {source}' in license_.note
    else:
        with pytest.raises(MultiExitError, match=f'License must be {source}, ') as caught:
            resolve_license(source, asked=other, base=BASE)
        assert '\n' not in str(caught.value)
    same = resolve_license(source, asked=source.upper(), base=BASE)
    assert same[:2] == EXPECTED[source][:2]


@pytest.mark.parametrize('source', EXPECTED)
def test_what_the_hub_does_not_list_has_a_name_and_a_link(source):
    license_ = resolve_license(source)
    assert (license_.id == 'other') == (source not in HUB_IDS)
    if license_.id == 'other':
        assert license_.name == source
        assert license_.link.startswith('https://')
    else:
        assert license_[1:3] == (None, None)


def test_the_list_of_the_hub_is_whole():
    """83 identifiers, two of which say nothing."""
    assert len(HUB_IDS) == 81
    assert HUB_IDS.isdisjoint({'other', 'unknown'})


def test_weights_from_scratch_are_apache_unless_asked():
    assert resolve_license(None)[:3] == ('apache-2.0', None, None)
    asked = resolve_license(None, asked='cc-by-nc-4.0')
    assert asked[:3] == ('cc-by-nc-4.0', None, None)
    assert 'from scratch' in asked.note
    assert resolve_license('', asked=' MIT ').id == 'mit'


@pytest.mark.parametrize('source', [None, 'unknown', 'other', ''])
def test_a_base_without_a_known_license_needs_one_that_is_asked_for(source):
    with pytest.raises(MultiExitError, match='--license'):
        resolve_license(source, base=BASE)
    license_ = resolve_license(source, asked='apache-2.0', base=BASE)
    assert license_.id == 'apache-2.0'
    assert BASE in license_.note


@pytest.mark.parametrize('asked', ['apache2', 'other', 'unknown', 'my own', 'mit\nx', 9 * 'long'])
def test_licenses_that_do_not_exist_cannot_be_asked_for(asked):
    with pytest.raises(MultiExitError, match='License must be one of') as caught:
        resolve_license(None, asked=asked)
    assert '\n' not in str(caught.value)


def test_licenses_beyond_timm_are_passed_on():
    assert resolve_license('gpl-3.0', base=BASE)[:2] == ('gpl-3.0', None)
    with pytest.raises(MultiExitError, match='License must be gpl-3.0, '):
        resolve_license('gpl-3.0', asked='mit', base=BASE)
    own = resolve_license('acme-license-2', base='acme/net')
    assert own[:3] == ('other', 'acme-license-2', 'https://huggingface.co/acme/net')
    assert resolve_license('acme-license-2', asked='acme-license-2', base='acme/net') == own


@pytest.mark.parametrize(
    ('source', 'base'), [('acme-license', None), ('see: file', 'acme/net'), ('acme-license', 'a/b](x')], ids=repr
)
def test_a_license_that_nobody_can_look_up_is_refused(source, base):
    with pytest.raises(MultiExitError, match='known neither to the Hub'):
        resolve_license(source, base=base)


@pytest.mark.parametrize(
    ('source', 'is_free'), [('cc-by-nc-4.0', False), ('cc-by-nc-sa-4.0', False), ('apple-amlr', False), ('gemma', True)]
)
def test_the_note_says_where_commerce_is_forbidden(source, is_free):
    assert ('forbids commercial use' in resolve_license(source, base=BASE).note) != is_free


def test_license_of_one_base_is_not_that_of_another():
    origin = Origin('org/net', 'mit')
    assert find_license(origin, PublicationInfo(base_model=origin.base))[1].id == 'mit'
    with pytest.raises(MultiExitError):
        find_license(origin, PublicationInfo(base_model='somebody/else'))
    assert find_license(Origin('a folder', 'mit'), PublicationInfo(base_model='somebody/else'))[1].id == 'mit'
    timms = PublicationInfo(base_model='timm/resnet18.fb_swsl_ig1b_ft_in1k')
    assert [find_license(each, timms)[1].id for each in (origin, Origin('a folder'))] == ['cc-by-nc-4.0'] * 2
    repository, license_ = find_license(origin, PublicationInfo('apache-2.0', 'somebody/else'))
    assert (repository, license_.id) == ('somebody/else', 'apache-2.0')
