"""Wrong arguments of routing attention: what, where, what to do."""

import pytest
import torch

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.routing.reference import routing_attention


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"centroids": torch.ones(4, 3, 8)}, ("centroids", "4 x 3 x 8", "Hkv x C x D = 2 x 3 x 8")),
        ({"centroids": torch.ones(2, 3, 7)}, ("2 x 3 x 7", "2 x 3 x 8")),
        ({"centroids": torch.ones(2, 0, 8)}, ("2 x 0 x 8", "2 x 1 x 8")),
        ({"centroids": torch.ones(3, 8)}, ("3 x 8", "Hkv x C x D")),
        ({"centroids": torch.ones(2, 3, 8, dtype=torch.int64)}, ("torch.int64",)),
        ({"centroids": torch.ones(2, 3, 8, device="meta")}, ("cpu", "centroids on meta")),
        ({"rule": "top_w"}, ("'top_w'", "'argmax_window'", "'topw'")),
        ({"logits": "cosine"}, ("'cosine'", "'raw'", "'normed'")),
        ({"window_size": 0}, ("window_size is 0",)),
        ({"rule": "topw", "is_causal": True}, ("'topw'", "is_causal is True")),
        ({"key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)}, ("6 positions", "key 5")),
        ({"key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8), "rule": "topw", "shared_qk": True}, ("5",)),
        ({"key": torch.zeros(1, 2, 0, 8), "value": torch.zeros(1, 2, 0, 8)}, ("key 0",)),
        ({"shared_qk": True}, ("4 heads", "key 2")),
        ({"enable_gqa": False}, ("4 heads", "have 2")),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, ("1 heads and 6 queries",)),
        ({"attn_mask": torch.ones(1, 4, 1, 6, dtype=torch.bool)}, ("4 heads and 1 queries",)),
        ({"attn_mask": torch.ones(6, 7)}, ("6 x 7", "1 x 4 x 6 x 6")),
        ({"center_query": torch.ones(4, 8)}, ("center_query", "4 x 8", "2 x 8")),
        ({"center_key": torch.ones(8)}, ("center_key", "2 x 8")),
        ({"routing_query": torch.ones(1, 2, 6, 8)}, ("routing_query", "1 x 2 x 6 x 8", "1 x 4 x 6 x 8")),
        ({"routing_key": torch.ones(1, 4, 6, 8)}, ("routing_key", "1 x 4 x 6 x 8", "1 x 2 x 6 x 8")),
        ({"routing_key": torch.ones(1, 2, 6, 8), "logits": "normed"}, ("'normed'", "routing_key")),
        ({"window": 2}, ("2", "False")),
        ({"window": 0, "is_causal": True}, ("0",)),
        ({"dropout_p": 1.5}, ("1.5",)),
    ],
)
def test_say_both_sides(change, says):
    arguments = {
        "query": torch.zeros(1, 4, 6, 8),
        "key": torch.zeros(1, 2, 6, 8),
        "value": torch.zeros(1, 2, 6, 8),
        "centroids": torch.ones(2, 3, 8),
        "enable_gqa": True,
    } | change
    with pytest.raises(LoweringError) as raised:
        routing_attention(**arguments)
    assert raised.value.code == "AR402"
    assert all(part in raised.value.detail for part in says), raised.value.detail


def test_what_sharing_leaves_without_use_is_refused():
    states = torch.zeros(1, 2, 6, 8)
    for useless in ({"routing_key": states}, {"center_key": torch.zeros(2, 8)}):
        with pytest.raises(LoweringError, match="shared_qk is True, so routing_key and center_key"):
            routing_attention(states, states, states, torch.ones(2, 3, 8), shared_qk=True, **useless)


def test_the_causal_rule_of_the_paper_is_named_as_the_way_out():
    states = torch.zeros(1, 2, 6, 8)
    with pytest.raises(LoweringError, match="paper_causal=True"):
        routing_attention(states, states, states, torch.ones(2, 3, 8), rule="topw", is_causal=True)
