"""What one transformer block holds while it runs: forward, recomputation and backward, moment by moment.

Bytes throughout; the letters are those of planner.memory.
"""

import dataclasses

from dmd_ds.planner.sizes import Setup


@dataclasses.dataclass(frozen=True)
class Block:
    """What one block holds while it runs; `rank`: of an adapter over its layers, nothing but which is trained, None without."""

    setup: Setup
    batch: int
    rank: int | None

    @property
    def lora(self) -> bool:
        return self.rank is not None

    @property
    def u(self) -> int:
        return self.batch * self.setup.rank_tokens * self.setup.model.width

    @property
    def a(self) -> int:
        return self.setup.precision.weights

    @property
    def copy(self) -> int:
        """Bytes of the float32 copy that `.float()` makes; of a float32 tensor it makes none."""
        return 4 if self.a != 4 else 0

    @property
    def product(self) -> int:
        """A norm of q or k that is not one kernel keeps the normed tensor for the gradient of its weight."""
        return 4 if not self.setup.precision.accelerator and not self.lora else 0

    @property
    def wide(self) -> float:
        """F / D."""
        return self.setup.model.ffn / self.setup.model.width

    @property
    def around(self) -> float:
        """Held by every forward: the rotary embedding of these tokens, the text after its projection."""
        model, a = self.setup.model, self.a
        return 2 * self.setup.rank_tokens * model.head_dim * 4 + self.batch * self.setup.text_tokens * model.width * a

    def forward(self) -> float:
        """Most that a forward without gradient holds, its input with it."""
        a = self.a
        # input, cross-attention's output, stream, its norm; the feed-forward before and after GELU, or three parts of a LoRA sum
        feed_forward = 4 * a + (3 if self.lora else 2) * a * self.wide
        # the last sum in float32: stream and feed-forward are copied, then product and sum
        last_sum = 5 * a + max(2 * self.copy + 4, self.copy + 8)
        moments = [feed_forward, last_sum]
        if self.setup.ulysses > 1:
            # input, norm, q, k, v; q exchanged, k and v joined, and that twice more on its way through the all-to-all
            moments.append(12 * a)
        if self.setup.ring > 1:
            # as before, with exchanged q, k, v; arriving k and v; float32 result, the block's own, and their sum
            moments.append(8 * a + 2 * a + 8 + a)
        return self.u * max(moments) + self.around

    # What autograd keeps of one block, in bytes of u. Without LoRA gradients also flow to norms' scales and gates.

    def kept_attention(self) -> float:
        a, whole = self.a, 0 if self.lora else 1
        queries = 2 * (2 * a + self.product)  # q and k: before their norm, after the rotation
        exchanged = a if self.setup.ulysses > 1 else 0  # the result's, before and after it
        return self.copy + 4 * whole + a + queries + a + a + exchanged + a * whole

    def kept_cross_attention(self) -> float:
        a = self.a
        return 4 + a + 2 * a + self.product + a  # norm's input and output; q before and after its norm; the result

    def kept_feed_forward(self) -> float:
        a, whole = self.a, 0 if self.lora else 1
        return 4 + 4 * whole + a + 2 * a * self.wide + 4 * whole  # norm's input and output, its cast; before, after GELU; the result

    def kept_text(self) -> float:
        """Keys and values of the text, bytes."""
        return self.batch * self.setup.text_tokens * self.setup.model.width * (3 * self.a + self.product)

    def kept_adapter(self) -> float:
        """What lies between the two matrices of the adapters, bytes."""
        tokens = 8 * self.setup.rank_tokens + 2 * self.setup.text_tokens
        return self.batch * tokens * self.rank * self.a if self.rank else 0

    def kept(self) -> float:
        """All that one block keeps for its backward, bytes, without its input."""
        shares = self.kept_attention() + self.kept_cross_attention() + self.kept_feed_forward()
        log_sum_exp = 2 * 4 * self.batch * self.setup.rank_tokens * self.setup.model.heads
        return self.u * shares + log_sum_exp + self.kept_text() + self.kept_adapter()

    def graph(self) -> float:
        """What all blocks together keep from forward to backward: their inputs, or everything; offloaded, the one input in use."""
        layers = self.setup.model.layers
        if self.setup.checkpointing:
            return (1 if self.setup.activation_offload else layers) * self.a * self.u
        return layers * (self.kept() + (self.u * self.a if not self.copy else 0))

    def before_last(self) -> float:
        """The graph while the last block runs forward with gradient."""
        if self.setup.activation_offload:
            return 0
        return self.graph() * (1 - 1 / self.setup.model.layers)

    def forward_with_graph(self) -> float:
        """Most that the last block holds in a forward that is followed by a backward."""
        return self.forward() if self.setup.checkpointing else max(self.forward(), self.kept() + self.u * self.a + self.around)

    def last_layer(self) -> float:
        """The last norm's input and output and the projection's input, kept until the backward begins."""
        return self.u * ((4 + self.a) if self.lora else (8 + self.a))

    def backward_moments(self) -> dict[str, tuple[float, float]]:
        """(activations beside the graph, elements of weight gradients) at the turns of the last block's backward."""
        u, a, model = self.u, self.a, self.setup.model
        full = 0 if self.lora else 1
        kept = self.kept() if self.setup.checkpointing else 0
        feed_forward = u * self.kept_feed_forward()
        behind = u * (self.kept_feed_forward() + self.kept_cross_attention()) + self.kept_text()
        exchange = 4 * a if self.setup.ulysses > 1 else 0
        ring = 4 + 3 * 8 + 2 * a if self.setup.ring > 1 else 0  # dq; dk and dv own, sent and arriving; k and v arriving
        gradients = sum(model.block_weights()) * full
        attention = 4 * model.width**2 * full
        return {
            # gradient of the last sum in float32, times gate and times result
            "last sum": (kept + u * (a + self.copy + 4 + 4 * full), 0),
            # gradients of stream, of the feed-forward's result, of what GELU made (twice with LoRA: by base and by adapter)
            "feed-forward": (kept - 4 * full * u + u * (2 * a + (1 if full else 2) * a * self.wide), model.width * model.ffn * full),
            # gradients of stream, result, q, and of the norm's four steps
            "cross-attention": (kept - feed_forward + u * (2 * a + 4 * 4), gradients - 2 * attention + model.width**2 * full),
            "attention": (kept - behind + u * (2 * a + 4 * a + exchange + ring), gradients - attention),
            "block's end": (kept - behind - u * (self.kept_attention() - self.copy - a - 4 * full) + u * 3 * a, gradients),
        }
