"""What a step uploads: packed batches, and the static inputs of captured decode steps."""

import torch

from squall.runtime.inputs import DecodeInputs
from squall.runtime.pack import pack, source_of
from squall.runtime.params import SamplingParams
from squall.runtime.request import EngineRequest, Sequence
from squall.runtime.sample_plan import SampleRow
from squall.runtime.scheduler import Chunk

CPU = torch.device("cpu")
BLOCK = 4


def sequence(arrival: int, prompt: int, *blocks: list[int], **params: object) -> Sequence:
    """``arrival * 10 + i`` is its i-th prompt token."""
    ids = [arrival * 10 + i for i in range(prompt)]
    request = EngineRequest(arrival, ids, SamplingParams(**params), [], [])  # type: ignore[arg-type]
    seq = Sequence(request, arrival, 64, len(blocks))
    seq.blocks = list(blocks)
    return seq


def chunk(seq: Sequence, start: int, length: int = 1) -> Chunk:
    """A chunk that samples, as it is once the plan has been applied."""
    seq.computed = start + length
    seq.in_flight += 1
    return Chunk(seq, start, length, True, 0)


def sample_row(seq: Sequence) -> SampleRow:
    return SampleRow(seq.request.params, seq.request.prompt_ids, seq.output_ids)


def test_a_token_comes_from_the_host_or_from_the_last_step() -> None:
    seq = sequence(1, 3, [0])
    seq.row = 5
    assert [source_of(seq, i) for i in range(4)] == [-11, -12, -13, 5]


def test_pack_of_a_decode_in_flight_and_a_prefill() -> None:
    decoding, prompt = sequence(1, 3, [7]), sequence(2, 6, [2, 9])
    decoding.in_flight, decoding.row = 1, 1
    sampled = torch.tensor([40, 41], dtype=torch.int32)
    batch = pack([chunk(decoding, 3), Chunk(prompt, 2, 3, False, 0)], BLOCK, sampled)
    assert batch.token_ids.tolist() == [41, 22, 23, 24]
    assert batch.positions.tolist() == [3, 2, 3, 4]
    assert batch.slots.tolist() == [31, 10, 11, 36]
    assert batch.query_start.tolist() == [0, 1, 4]
    assert batch.context_lens.tolist() == [4, 5]
    assert batch.block_tables.tolist() == [[7, -1], [2, 9]]
    assert batch.logit_rows is not None
    assert batch.logit_rows.tolist() == [0]
    assert (batch.query_lens, batch.contexts) == ((1, 3), (4, 5))
    tensors = [getattr(batch, name) for name in batch.__dataclass_fields__]
    assert {t.dtype for t in tensors if isinstance(t, torch.Tensor)} == {torch.int32}


def test_pack_gives_every_group_its_own_slots_and_tables() -> None:
    decoding, prompt = sequence(1, 9, [7, 3, 1], [-1, -1, 4]), sequence(2, 6, [2, 9], [5, 6])
    sampled = torch.zeros(2, dtype=torch.int32)
    batch = pack([chunk(decoding, 8), Chunk(prompt, 2, 3, False, 0)], BLOCK, sampled)
    first, second = batch.views()
    assert first is batch
    assert (first.slots.tolist(), second.slots.tolist()) == ([4, 10, 11, 36], [16, 22, 23, 24])
    assert first.block_tables.tolist() == [[7, 3, 1], [2, 9, -1]]
    assert second.block_tables.tolist() == [[-1, -1, 4], [5, 6, -1]]
    assert second.positions is first.positions


def test_static_inputs_of_several_groups() -> None:
    inputs = DecodeInputs(3, 2, 4, BLOCK, CPU)
    a, b = sequence(1, 9, [7, 3, 1], [-1, 2, 4]), sequence(2, 6, [2, 9], [5, 6])
    rows = [sample_row(a), sample_row(b)]
    inputs.fill([chunk(a, 8), chunk(b, 5)], rows, 3)
    assert inputs.fields.views["slots"].tolist() == [[4, 37, -1], [16, 25, -1]]
    assert inputs.block_tables[:, 0, :3].tolist() == [[7, 3, 1], [-1, 2, 4]]
    assert inputs.block_tables[:, 1, :2].tolist() == [[2, 9], [5, 6]]
    a.blocks = [[7, 3, 1, 8], [-1, -1, 4, 0]]  # grown, and slid
    inputs.fill([chunk(a, 12), chunk(b, 6)], rows, 3)
    assert inputs.block_tables[0, 0].tolist() == [7, 3, 1, 8]
    assert inputs.block_tables[1, 0].tolist() == [-1, 2, 4, 0]
    assert inputs.fields.views["slots"].tolist() == [[32, 38, -1], [0, 26, -1]]


def test_static_inputs_of_a_padded_decode() -> None:
    inputs = DecodeInputs(4, 1, 6, BLOCK, CPU)
    greedy = sequence(1, 5, [3, 8], temperature=0.0)
    drawn = sequence(2, 4, [5], temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=9)
    drawn.in_flight, drawn.row = 1, 0
    drawn.blocks[0].append(1)
    rows = [sample_row(greedy), sample_row(drawn)]
    inputs.fill([chunk(greedy, 4), chunk(drawn, 4)], rows, 3)
    view = {name: tensor[..., :3].tolist() for name, tensor in inputs.fields.views.items()}
    assert view["source"] == [-15, 0, -1]
    assert view["positions"] == [4, 4, 0]
    assert view["slots"] == [[32, 4, -1]]
    assert view["context_lens"] == [5, 5, 0]
    assert view["output_position"] == [0, 1, 0]
    assert view["temperature"] == [0.0, 0.5, 0.0]
    assert (view["top_k"], view["top_p"], view["min_p"]) == ([0, 7, 0], [1, 0.75, 1], [0, 0.25, 0])
    assert view["key"][1] % 2**64 == rows[1].key
    assert inputs.block_tables[0, :2, :2].tolist() == [[3, 8], [5, 1]]


def test_block_tables_follow_growth_change_and_preemption() -> None:
    inputs = DecodeInputs(2, 1, 4, BLOCK, CPU)
    a, b = sequence(1, 3, [1, 2]), sequence(2, 3, [3])

    def table(*sequences: Sequence) -> list[list[int]]:
        inputs.fill([chunk(s, 2) for s in sequences], [sample_row(s) for s in sequences], 2)
        tables = inputs.block_tables[0]
        return [tables[i, : len(s.blocks[0])].tolist() for i, s in enumerate(sequences)]

    assert table(a, b) == [[1, 2], [3]]
    a.blocks[0].append(6)
    assert table(a, b) == [[1, 2, 6], [3]]
    assert table(b) == [[3]]  # it moved to another row
    b.blocks, b.preemptions = [[5]], 1  # recomputed elsewhere
    assert table(b) == [[5]]
    inputs.block_tables.fill_(-7)  # nothing changed: nothing is sent
    assert table(b) == [[-7]]


def test_a_sequence_that_leaves_moves_only_one_other() -> None:
    inputs = DecodeInputs(4, 1, 4, BLOCK, CPU)
    a, b, c, d = (sequence(i, 3, [i]) for i in range(1, 5))
    assert inputs.arrange([a, b, c]) == [2, 1, 0]  # none has a row yet: any order will do
    inputs.fill([chunk(s, 2) for s in (a, b, c)], [sample_row(s) for s in (a, b, c)], 4)
    assert inputs.arrange([b, c]) == [1, 0]  # c, beyond the end, takes a's row
    assert inputs.arrange([a, c, d]) == [0, 2, 1]
