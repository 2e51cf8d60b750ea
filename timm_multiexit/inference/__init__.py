"""Batches that shrink as samples leave, one exit after the other, and answers by a deadline."""
