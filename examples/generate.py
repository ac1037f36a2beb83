"""Load a converted model and write with it.

python examples/generate.py FOLDER
"""

import sys

from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import flash_heads, load

model, tokenizer = load(sys.argv[1])
head = next(flash_heads(model))
print(f"{head.n_probes} of {head.n_clusters} clusters are probed per token\n")

sampler = make_sampler(temp=0.8, top_p=0.95)
for response in stream_generate(
    model, tokenizer, "The lighthouse keeper", max_tokens=60, sampler=sampler
):
    print(response.text, end="", flush=True)
print(f"\n\n{response.generation_tps:.1f} tokens per second")
