"""Batches that shrink as samples leave, one exit after the other, and answers by a deadline."""

from timm_multiexit.inference.deadline import PartTimes as PartTimes
from timm_multiexit.inference.deadline import predict_by_deadline as predict_by_deadline
from timm_multiexit.inference.routing import Route as Route
from timm_multiexit.inference.routing import find_leaving as find_leaving
