"""The Hugging Face Hub: the only code of the package that uses the network."""

from timm_multiexit.hub_client.client import PushResult as PushResult
from timm_multiexit.hub_client.client import Snapshot as Snapshot
from timm_multiexit.hub_client.client import check_push as check_push
from timm_multiexit.hub_client.client import fetch_files as fetch_files
from timm_multiexit.hub_client.client import push_folder as push_folder
