import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_support import H100, H200, key

from attnrewrite.kernels.store.device import device_of
from attnrewrite.kernels.store.key import Difference, bucket, differences, pairs, slug


def test_equal_keys_have_one_digest_and_any_field_changes_it():
    changes = {
        "family": "other",
        "kernel": "backward_keys",
        "source": "1f" * 32,
        "triton": "3.6.0",
        "target": "sm_80",
        "device": H100,
        "dtypes": ("fp16",),
        "dims": pairs({"D": 128, "Dv": 64}),
        "flags": pairs({"CAUSAL": False, "MASK": "none"}),
        "bucket": bucket({"L": 1, "S": 4096}),
        "deterministic": False,
    }
    assert changes.keys() == key().to_json().keys()
    changed = [key(**{name: value}) for name, value in changes.items()]
    assert key() == key()
    assert hash(key()) == hash(key())
    assert len({each.digest for each in (key(), *changed)}) == len(changed) + 1
    assert len({key(), *changed}) == len(changed) + 1


def test_digests_of_keys_that_may_be_near_end_alike():
    near = [key(8192), key(device=H100), key(triton="3.6.0"), key(source="1f" * 32)]
    assert {each.digest[48:] for each in (key(), *near)} == {key().kind}
    assert key(kernel="delta").kind != key().kind


@pytest.mark.parametrize("field", H200._fields)
def test_every_fact_about_a_device_is_in_the_key(field):
    other = H200._replace(**{field: "x" if field in ("name", "mig") else 1})
    assert [d.field for d in differences(key(), key(device=other))] == [f"device.{field}"]


def test_differences_are_named_field_by_field():
    other = key(8192, triton="3.6.0", dims=pairs({"D": 64}))
    assert differences(key(), other) == [
        Difference("triton", "3.7.1", "3.6.0"),
        Difference("dims.Dv", 64, None),
        Difference("bucket.L", 12, 13),
        Difference("bucket.S", 12, 13),
    ]
    assert differences(key(), key()) == []


@given(st.integers(0, 2**40))
def test_bucket_is_the_ceiling_of_the_logarithm(size):
    ((_, step),) = bucket({"L": size})
    assert size <= 2**step
    assert step == 0 or size > 2 ** (step - 1)


def test_slug_is_the_name_of_a_folder():
    assert slug("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == "nvidia-h100-80gb-hbm3-mig-1g-10gb"
    assert slug("../../etc") == "etc"
    assert slug("../..") == "unnamed"


def test_slices_of_a_gpu_are_devices_of_their_own():
    class Properties:
        name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
        multi_processor_count = 16
        shared_memory_per_block = 49152
        shared_memory_per_block_optin = 232448
        L2_cache_size = 6553600

    found = device_of(Properties)
    assert found == (Properties.name, 16, 232448, 6553600, "1g.10gb")
