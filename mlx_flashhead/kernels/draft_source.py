"""The text of the kernels that draft: see draft.py."""

GREEDY = """
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint n_probes = settings[0];
    uint n_entries = summary_shape[2];
    size_t entries = size_t(row) * 4 * n_entries;
    threadgroup float highs[32];
    threadgroup float masses[32];
    threadgroup float bests[32];
    threadgroup uint ats[32];

    // NaN never compares, so it never wins.
    float best = -INFINITY;
    uint token = ~0u;
    float logit = -INFINITY;
    float high = -INFINITY;
    float mass = 0.0f;
    for (uint i = lid; i < n_entries; i += THREADS) {
        float first = as_type<float>(summary[entries + i]);
        float second = as_type<float>(summary[entries + n_entries + i]);
        if (i < n_probes) {
            add_mass(high, mass, first, second);
            uint other = summary[entries + 2 * n_entries + i];
            if (first > best || (first == best && other < token)) {
                best = first;
                token = other;
                logit = as_type<float>(summary[entries + 3 * n_entries + i]);
            }
        } else {
            add_mass(high, mass, second, 1.0f);
        }
    }
    uint own = token;
    find_mass<THREADS>(high, mass, highs, masses, simd_lid, simd_gid);
    find_best<THREADS>(best, token, bests, ats, simd_lid, simd_gid);
    if (lid == 0) {
        tokens[row] = token;
    }
    // A token stands once, but where all that it has is padding.
    bool there = best > -INFINITY;
    if (there ? own == token : lid == 0) {
        logprobs[row] = logit - (high + precise::log(mass));
    }
"""

# What is left of P clusters at the end of a filter is a distance from the top, limit.
# A simdgroup looks at PER clusters at once, LANES lanes each.
SAMPLED = """
    constexpr bool FILTERED = TOP_P || MIN_P || XTC || TOP_K;
    constexpr int SIMDGROUPS = THREADS / 32;
    constexpr uint LANES = M > 16 ? 32 : M > 8 ? 16 : M > 4 ? 8 : M > 2 ? 4 : M;
    constexpr uint PER = 32 / LANES;
    static_assert(COARSE == 10, "two digits of 11 bits come before it");
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint P = probes_shape[1];
    uint C = token_ids_shape[0];
    uint n_entries = summary_shape[2];
    size_t entries = size_t(row) * 4 * n_entries;
    size_t base = size_t(row) * P * M;
    float temperature = as_type<float>(settings[0]);
    float scale = as_type<float>(settings[1]);
    float cap = as_type<float>(settings[2]);

    threadgroup atomic_uint bins[TOP_P || FEWEST || TOP_K ? BINS : 1];
    threadgroup atomic_uint count[1];
    threadgroup uint listed[FILTERED ? LISTED : 1];
    threadgroup uint sums[32];
    threadgroup uint bin_at[3];
    threadgroup float tops[32];
    threadgroup float highs[32];
    threadgroup float masses[32];
    threadgroup float rests[32];
    threadgroup float parts[32];
    threadgroup float bests[32];
    threadgroup uint ats[32];
    threadgroup ulong totals[32];
    threadgroup uint words[6];
    threadgroup float scored[M];

    if (lid < 6) {
        words[lid] = split_word(keys[2 * row], keys[2 * row + 1], lid);
    }
    // The largest logit, the mass of all tokens, and what to draw if nothing is
    // filtered: the place of a probed cluster, or P more than the number of another.
    float top = -INFINITY;
    float high = -INFINITY;
    float whole = 0.0f;
    float best = -INFINITY;
    uint at = ~0u;
    for (uint i = lid; i < n_entries; i += THREADS) {
        float first = as_type<float>(summary[entries + i]);
        float second = as_type<float>(summary[entries + n_entries + i]);
        uint third = summary[entries + 2 * n_entries + i];
        bool probed = i < P;
        add_mass(high, whole, probed ? first : second, probed ? second : 1.0f);
        top = probed && first > top ? first : top;
        float chance = probed ? as_type<float>(third) : first;
        if (!FILTERED && chance > best) {
            best = chance;
            at = probed ? i : P + third;
        }
    }
    top = simd_max(top);
    if (simd_lid == 0) {
        tops[simd_gid] = top;
    }
    find_mass<THREADS>(high, whole, highs, masses, simd_lid, simd_gid);
    top = simd_max(simd_lid < SIMDGROUPS ? tops[simd_lid] : -INFINITY);

    uint limit = ~0u;
    ulong inverse = 0;
    uint lowest = ~0u;  // the share above which XTC drops
    bool tail_left = !EMPTY && !MIN_P;
    float sum = 0.0f;
    float rest = 0.0f;
    if (TOP_P || XTC) {
        for (uint i = lid; i < n_entries; i += THREADS) {
            if (i < P) {
                float mass = as_type<float>(summary[entries + 3 * n_entries + i]);
                sum += scaled(mass, as_type<float>(summary[entries + i]), top);
            } else {
                float mass = as_type<float>(summary[entries + n_entries + i]) - top;
                rest += precise::exp(mass < 60.0f ? mass : 60.0f);
            }
        }
        sum = simd_sum(sum);
        rest = simd_sum(rest);
        if (simd_lid == 0) {
            parts[simd_gid] = sum;
            rests[simd_gid] = rest;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = simd_sum(simd_lid < SIMDGROUPS ? parts[simd_lid] : 0.0f);
        rest = simd_sum(simd_lid < SIMDGROUPS ? rests[simd_lid] : 0.0f);
    }
    // In turn: top-p; where min-p keeps some tokens in any case, how far away those
    // are; XTC; top-k. Whatever counts tokens looks at the best of clusters first: the
    // k best tokens are in the clusters of the k best of those.
    uint bound = ~0u;
    uint farthest = 0;
    for (int stage = 0; FILTERED && stage < 6; stage++) {
        if (stage == 3) {
            limit = min(limit, max(settings[3], farthest));
            bound = limit;
            float coin = uniform_number(words[4], words[5], 0, 1);
            if (XTC && coin <= as_type<float>(settings[9])) {
                // Masses that count at all.
                uint n = list_blocks<THREADS>(
                    summary, entries, n_entries, P, top, min(limit, 0x7fffffffu),
                    -INFINITY, listed, count, lid, simd_lid, simd_gid);
                bool every = n > LISTED;
                n = every ? P : n;
                ulong total = 0;
                for (uint i = simd_gid * PER + simd_lid / LANES; i < n;
                     i += SIMDGROUPS * PER) {
                    uint q = every ? i : listed[i];
                    for (uint r = simd_lid % LANES; r < M; r += LANES) {
                        float value = shaped<DROPPED, CAPPED>(
                            load(logits, base + q * M + r), scale, cap);
                        uint levels = levels_below(top, value, LOG2E);
                        total += levels <= limit ? exp2_negative(levels, 0) : 0;
                    }
                }
                total = simd_total(total);
                if (simd_lid == 0) {
                    totals[simd_gid] = total;
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                total = simd_total(simd_lid < SIMDGROUPS ? totals[simd_lid] : ulong(0));
                total += tail_left ? tail_mass(rest) : ulong(0);
                inverse = (ulong(1) << 63) / total;
                for (uint i = simd_gid * PER + simd_lid / LANES; i < n;
                     i += SIMDGROUPS * PER) {
                    uint q = every ? i : listed[i];
                    for (uint r = simd_lid % LANES; r < M; r += LANES) {
                        float value = shaped<DROPPED, CAPPED>(
                            load(logits, base + q * M + r), scale, cap);
                        uint levels = levels_below(top, value, LOG2E);
                        uint share = share_of(levels, inverse);
                        bool above = levels <= limit && share > settings[8];
                        lowest = above && share < lowest ? share : lowest;
                    }
                }
                lowest = simd_min(lowest);
                if (simd_lid == 0) {
                    sums[simd_gid] = lowest;
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                lowest = simd_min(simd_lid < SIMDGROUPS ? sums[simd_lid] : ~0u);
            }
            continue;
        }
        bool of_blocks = stage == 1 || stage == 4;
        if (stage == 0 ? !TOP_P : stage < 3 ? !FEWEST : !TOP_K) {
            continue;
        }
        if (stage == 4 && lowest < ~0u) {
            continue;  // the best of a cluster may be dropped
        }
        if (TOP_P && stage == 0) {
            ulong total = fixed_mass(sum > 1.0f ? sum : 1.0f);
            total += EMPTY ? ulong(0) : tail_mass(rest);
            inverse = (ulong(1) << 63) / total;
            // What is farther away than this is, all together, half of what the
            // candidates have more than is asked for, and so not needed.
            float more = sum - as_type<float>(settings[11]) * (sum + rest);
            float away = precise::log(2.0f * float(P * M) / more) * LOG2E;
            if (more > 1e-3f * (sum + rest)) {
                bound = fixed_point(away > 0.0f ? away : 0.0f);
            }
            if (more < -1e-3f * (sum + rest)) {
                continue;  // candidates are too few: all are kept, and the tail
            }
        }
        uint n = P;
        if (!of_blocks) {
            n = list_blocks<THREADS>(
                summary, entries, n_entries, P, top, bound,
                -INFINITY, listed, count, lid, simd_lid, simd_gid);
        }
        bool every = n > LISTED;
        n = every ? P : n;
        uint within = stage < 3 ? ~0u : limit;
        uint cut = 0;
        uint remaining = settings[stage == 0 ? 4 : stage < 3 ? 7 : 5];
        bool reached = true;
        for (int digit = 0; digit < (stage == 2 ? 3 : 2); digit++) {
            int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
            int width = digit == 2 ? 10 : 11;
            clear_bins<THREADS>(bins, lid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = simd_gid * PER + simd_lid / LANES; i < n && !of_blocks;
                 i += SIMDGROUPS * PER) {
                uint q = every ? i : listed[i];
                for (uint r = simd_lid % LANES; r < M; r += LANES) {
                    float value = shaped<DROPPED, CAPPED>(
                        load(logits, base + q * M + r), scale, cap);
                    uint levels = levels_below(top, value, LOG2E);
                    if (levels > within
                        || (digit > 0 && levels >> (shift + width) != cut)) {
                        continue;
                    }
                    // A candidate counts its share of the mass, in units of 2^-31,
                    // for top-p and else itself.
                    uint number = 1;
                    if (stage == 0) {
                        number = share_of(levels, inverse);
                    } else if (XTC && share_of(levels, inverse) > lowest) {
                        uint c = probes[size_t(row) * P + q];
                        number = is_one_of(
                            special, settings[10], token_ids[size_t(c) * M + r]);
                    }
                    if (number > 0) {
                        atomic_fetch_add_explicit(
                            &bins[(levels >> shift) & ((1u << width) - 1)], number,
                            memory_order_relaxed);
                    }
                }
            }
            for (uint q = lid; q < P && of_blocks; q += THREADS) {
                float value = as_type<float>(summary[entries + q]);
                uint levels = levels_below(top, value, LOG2E);
                if (levels <= within
                    && (digit == 0 || levels >> (shift + width) == cut)) {
                    atomic_fetch_add_explicit(
                        &bins[(levels >> shift) & ((1u << width) - 1)], 1u,
                        memory_order_relaxed);
                }
            }
            find_bin<THREADS>(bins, sums, bin_at, remaining, lid, simd_lid, simd_gid);
            cut = cut << width | bin_at[0];
            remaining -= bin_at[1];
            reached = reached && bin_at[2] == 1;
        }
        // Ties are kept: logits within about 1e-5, but for stage 2.
        uint edge = ~0u;
        if (reached) {
            edge = stage == 2 ? cut : cut << COARSE | ((1u << COARSE) - 1);
        }
        if (stage == 0) {
            limit = edge;
            tail_left = tail_left && !reached;
            bound = ~0u;
        } else if (of_blocks) {
            bound = min(within, edge);
        } else if (stage == 2) {
            farthest = edge;
        } else {
            limit = min(limit, edge);
        }
    }

    // The cluster. Without a filter its chance could only be larger, so those count
    // whose chance is not below what the best has with the filter.
    if (FILTERED) {
        for (uint q = lid; q < P; q += THREADS) {
            float value = as_type<float>(summary[entries + q]);
            float chance = as_type<float>(summary[entries + 2 * n_entries + q]);
            bool counts = levels_below(top, value, LOG2E) <= limit && chance > best;
            best = counts ? chance : best;
        }
        find_best<THREADS>(best, at, bests, ats, simd_lid, simd_gid);
        for (int round = 0; round < 2; round++) {
            float least = best;
            if (round > 0) {
                least -= 1e-3f * (1.0f + (best < 0.0f ? -best : best));
            }
            uint n = list_blocks<THREADS>(
                summary, entries, n_entries, P, top, limit,
                least, listed, count, lid, simd_lid, simd_gid);
            bool every = n > LISTED;
            n = every ? P : n;
            best = -INFINITY;
            at = ~0u;
            for (uint from = simd_gid * PER; from < n; from += SIMDGROUPS * PER) {
                uint i = from + simd_lid / LANES;
                uint q = i >= n ? 0 : every ? i : listed[i];
                uint c = probes[size_t(row) * P + q];
                float values[(M + LANES - 1) / LANES];
                float highest = -INFINITY;
#pragma unroll
                for (uint j = 0; j < (M + LANES - 1) / LANES; j++) {
                    uint r = j * LANES + simd_lid % LANES;
                    values[j] = -INFINITY;
                    if (r < M && i < n) {
                        float value = shaped<DROPPED, CAPPED>(
                            load(logits, base + q * M + r), scale, cap);
                        uint levels = levels_below(top, value, LOG2E);
                        bool kept = levels <= limit;
                        if (XTC && kept && share_of(levels, inverse) > lowest) {
                            kept = is_one_of(
                                special, settings[10], token_ids[size_t(c) * M + r]);
                        }
                        values[j] = kept ? value : -INFINITY;
                    }
                    highest = values[j] > highest ? values[j] : highest;
                }
                highest = lanes_max<LANES>(highest);
                float mass = 0.0f;
#pragma unroll
                for (uint j = 0; j < (M + LANES - 1) / LANES; j++) {
                    mass += highest > -INFINITY
                        ? precise::exp((values[j] - highest) / temperature) : 0.0f;
                }
                mass = lanes_sum<LANES>(mass);
                float value = highest / temperature + precise::log(mass)
                    + gumbel(words[0], words[1], c, C);
                if (value > best || (value == best && q < at)) {
                    best = value;
                    at = q;
                }
            }
            if (TAIL && tail_left && round > 0) {
                for (uint i = P + lid; i < n_entries; i += THREADS) {
                    float value = as_type<float>(summary[entries + i]);
                    if (value > best) {
                        best = value;
                        at = P + summary[entries + 2 * n_entries + i];
                    }
                }
            }
            find_best<THREADS>(best, at, bests, ats, simd_lid, simd_gid);
        }
    } else {
        find_best<THREADS>(best, at, bests, ats, simd_lid, simd_gid);
    }
    at = at == ~0u ? 0 : at;
    bool outside = TAIL && at >= P;
    uint cluster = outside ? at - P : probes[size_t(row) * P + at];

    // Its logits: those that there are, or those of the rows, scored here.
    if (outside) {
        for (uint r = simd_gid; r < M; r += SIMDGROUPS) {
            uint number = cluster * M + r;
            bool real = number < settings[6];
            uint numbers[1] = {real ? number : 0};
            float value[1];
            score_rows<T, D, BITS, GROUP_SIZE, QUANTIZED, 1, 32>(
                (const device uint*)(x + size_t(row) * D), (const device uint*)weight,
                scales, biases, numbers, simd_lid, value);
            float logit = value[0];
            if (BIASED) {
                logit += load(bias, numbers[0]);
            }
            if (simd_lid == 0) {
                scored[r] = real ? transformed<CAPPED>(logit, scale, cap) : -INFINITY;
            }
        }
    } else {
        for (uint r = lid; r < M; r += THREADS) {
            float value = shaped<DROPPED, CAPPED>(
                load(logits, base + at * M + r), scale, cap);
            uint levels = levels_below(top, value, LOG2E);
            bool kept = levels <= limit;
            if (XTC && kept && share_of(levels, inverse) > lowest) {
                kept = is_one_of(
                    special, settings[10], token_ids[size_t(cluster) * M + r]);
            }
            scored[r] = kept ? value : -INFINITY;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    best = -INFINITY;
    uint chosen = ~0u;
    for (uint r = lid; r < M; r += THREADS) {
        float value = scored[r] / temperature + gumbel(words[2], words[3], r, M);
        if (value > best) {
            best = value;
            chosen = r;
        }
    }
    find_best<THREADS>(best, chosen, bests, ats, simd_lid, simd_gid);
    chosen = chosen < M ? chosen : 0;
    if (outside && simd_gid == 0) {
        // The cluster's mass is known now: it takes the place of what was expected.
        float most = -INFINITY;
        for (uint r = simd_lid; r < M; r += 32) {
            most = scored[r] > most ? scored[r] : most;
        }
        most = simd_max(most);
        float mass = 0.0f;
        for (uint r = simd_lid; r < M; r += 32) {
            mass += scaled(1.0f, scored[r], most);
        }
        mass = simd_sum(mass);
        float expected = load(at_one, cluster) + transformed<CAPPED>(
            load(centroid_logits, size_t(row) * C + cluster), scale, cap);
        whole -= precise::exp(expected - high);
        whole = whole > 0.0f ? whole : 0.0f;
        add_mass(high, whole, most, mass);
    }
    if (lid == 0) {
        tokens[row] = token_ids[size_t(cluster) * M + chosen];
        float logit = outside ? scored[chosen] : transformed<CAPPED>(
            load(logits, base + at * M + chosen), scale, cap);
        logprobs[row] = logit - (high + precise::log(whole));
    }
"""
