"""From a run or a model to a folder for the Hub, with its card and license."""

from timm_multiexit.publishing.card import write_card as write_card
from timm_multiexit.publishing.publication import write_publication as write_publication
from timm_multiexit.publishing.push import publish_run as publish_run
from timm_multiexit.publishing.push import push_to_hub as push_to_hub
