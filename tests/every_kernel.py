"""Run every GPU kernel once on small inputs: what `make sanitize` watches.

Both head sizes that have kernels of their own, one that has not; all types; padding, packing, fewer queries than keys,
pruning by both rules, dropout; gradients of everything.
"""

import torch

from attention_inputs import draw_inputs, forgetting_attention, padding_mask


def main() -> None:
    for head_dim, dtype in ((64, torch.bfloat16), (128, torch.float16), (40, torch.bfloat16), (64, torch.float32)):
        for options, keys, queries in (
            ({"eps": 1e-3, "attention_mask": padding_mask("left", 2, 300).cuda()}, 300, 300),
            ({"eps": 1e-3, "rule": "paper", "dropout": 0.1}, 200, 130),
        ):
            inputs = draw_inputs(keys, queries, head_dim=head_dim, dtype=dtype)
            inputs = [x.detach().cuda().requires_grad_() for x in inputs]
            out = forgetting_attention(*inputs, **options)
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), inputs))
    packed = [x.detach().cuda() for x in draw_inputs(300, batch=1, head_dim=64, dtype=torch.bfloat16)]
    forgetting_attention(*packed, cu_seqlens=torch.tensor([0, 70, 300], device="cuda"))
    print("every kernel ran")


if __name__ == "__main__":
    main()
