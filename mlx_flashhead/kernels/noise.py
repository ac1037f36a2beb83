"""The noise that draws: the same numbers in plain MLX and in kernels."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

METAL = """
// Word i of the size words of mx.random.bits with a key: Threefry 2x32 with 20 rounds
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which makes
// two words at once, half of the size apart.
METAL_FUNC uint random_word(uint key0, uint key1, uint i, uint size) {
    uint n = (size + 1) / 2;
    uint partner = i + n < size ? i + n : 0;
    uint keys[3] = {key0, key1, key0 ^ key1 ^ 0x1bd11bdau};
    const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    uint a = (i < n ? i : i - n) + keys[0];
    uint b = (i < n ? partner : i) + keys[1];
#pragma unroll
    for (uint round = 0; round < 20; round++) {
        int r = rotations[round % 8];
        a += b;
        b = (b << r | b >> (32 - r)) ^ a;
        if (round % 4 == 3) {
            uint block = round / 4 + 1;
            a += keys[block % 3];
            b += keys[(block + 1) % 3] + block;
        }
    }
    return i < n ? a : b;
}

// Number i of mx.random.uniform(shape=(size,), key).
METAL_FUNC float uniform_number(uint key0, uint key1, uint i, uint size) {
    float u = float(random_word(key0, key1, i, size)) / 4294967296.0f;
    return u < 0.99999994f ? u : 0.99999994f;
}

// Number i of mx.random.gumbel((size,), key).
METAL_FUNC float gumbel(uint key0, uint key1, uint i, uint size) {
    return -precise::log(-precise::log(uniform_number(key0, key1, i, size)));
}

// Word i of the keys that Noise.make splits a key into: two words for the noise of
// clusters, two for that of rows, and two for the coin.
METAL_FUNC uint split_word(uint key0, uint key1, uint i) {
    return random_word(key0, key1, i, 6);
}
"""


class Noise(NamedTuple):
    """Noise of k positions, float32: Gumbel numbers of clusters ``[k, C]`` and of a
    cluster's rows ``[k, m]``, and uniform ones ``[k]``."""

    clusters: mx.array
    rows: mx.array
    coins: mx.array

    @classmethod
    def make(cls, n_clusters: int, cluster_size: int, keys: mx.array) -> Noise:
        """The noise of keys, uint32 ``[k, 2]``: that of each depends on it alone."""

        def of_one(key: mx.array) -> tuple[mx.array, ...]:
            parts = mx.random.split(key, 3)
            return (
                mx.random.gumbel((n_clusters,), key=parts[0]),
                mx.random.gumbel((cluster_size,), key=parts[1]),
                mx.random.uniform(key=parts[2]),
            )

        # One generation for all keys, where one for each would be as many launches.
        return cls(*mx.vmap(of_one)(keys))
