"""The rules that make a point legal for a job.

The search leaves illegal points out; for pins that allow no other, the first broken rule becomes the error.
"""

from collections.abc import Iterator

from seqmesh.planner.inputs.documents import MOST_DOCUMENTS
from seqmesh.planner.inputs.job import Job
from seqmesh.planner.inputs.point import Point


def is_pool(job: Job, point: Point) -> bool:
    """Whether a point's documents are one pool, but for its word: several sequences in a row on one ring.

    The balanced layout places them, or what `auto` finds as good.
    """
    on_one_ring = point.dp == 1 and point.ring > 1 and point.micro_batch > 1
    return bool(job.documents) and on_one_ring and job.layout in ("auto", "balanced")


def layers_of_a_stage(layers: int, pp: int, virtual: int, *, counts_ends: bool) -> int:
    """Of each of `virtual` stages on each of `pp` ranks; 0 if they are not alike.

    Where they are counted, embedding and head may stand for a layer each.
    """
    for ends in (0, 2) if counts_ends else (0,):
        each, rest = divmod(layers + ends, pp * virtual)
        if not rest and each * virtual == -(-layers // pp):  # no rank has more than without such stages
            return each
    return 0


def is_legal(job: Job, point: Point) -> bool:
    """Whether a point breaks no rule."""
    return not any(violations(job, point))


def violations(job: Job, point: Point) -> Iterator[str]:
    """The rules that a point breaks, each with what to do.

    The order counts: an error shows the first only, so what is wrong with the mesh comes before its knobs.
    """
    yield from mesh_violations(job, point)
    yield from knob_violations(job, point)


def mesh_violations(job: Job, point: Point) -> Iterator[str]:
    """Those of tp, ulysses, ring, dp and pp, whatever the knobs are."""
    yield from _ranks(job, point)
    yield from _heads(job, point)
    yield from _shared_by_tp(job, point)
    if point.pp > job.model.layers:
        layers = job.model.layers
        yield f"pp={point.pp} with {layers} layers leaves stages empty; use pp <= {layers}"
    yield from _tokens(job, point)


def knob_violations(job: Job, point: Point) -> Iterator[str]:
    """Those of the rest, on a mesh that breaks no rule."""
    yield from _experts(job, point)
    yield from _stages(job, point)
    yield from _sequences(job, point)
    yield from job.stack.violations(point, job)
    yield from _micro_batch(job, point)
    yield from _pool(job, point)
    yield from _savers(point)


def _ranks(job: Job, point: Point) -> Iterator[str]:
    gpus = job.cluster.gpus
    if point.gpus != gpus:
        yield (
            f"tp={point.tp} x ulysses={point.ulysses} x ring={point.ring} x dp={point.dp} x pp={point.pp}"
            f" = {point.gpus} ranks on {gpus} GPUs; choose degrees whose product is {gpus}"
        )


def _heads(job: Job, point: Point) -> Iterator[str]:
    """Tensor parallelism and ulysses both split heads; at most one rule is broken at a time."""
    m = job.model
    tp = point.tp
    # More tensor-parallel ranks than K/V heads could still share them evenly, as copies: a rule of its own.
    divides_kv = m.kv_heads % tp == 0 or tp % m.kv_heads == 0
    if m.heads % tp or not divides_kv:
        yield (
            f"tp={tp} does not divide {m.heads} query heads and {m.kv_heads} K/V heads; use a common divisor"
        )
    elif m.intermediate % tp or m.hidden % tp:
        yield (
            f"tp={tp} does not divide hidden={m.hidden} and intermediate={m.intermediate};"
            " use a common divisor"
        )
    elif tp > m.kv_heads:
        yield (
            f"tp={tp} with {m.kv_heads} K/V heads would hold copies of them; use tp <= {m.kv_heads},"
            " ulysses or ring for the rest"
        )
    elif point.ulysses > m.heads // tp:
        left = m.heads // tp
        yield (
            f"ulysses={point.ulysses} with {left} query heads on each tp={tp} rank leaves ranks without a"
            f" head; use ulysses <= {left} and put the rest on ring"
        )


def _shared_by_tp(job: Job, point: Point) -> Iterator[str]:
    m = job.model
    if point.tp > 1 and m.not_shared_by_tp:
        also = ""
        if m.mixture is not None:
            also = "; seqmesh train runs it, with mesh.experts a multiple of tp"
        elif m.mixer is not None:
            also = "; seqmesh train runs it, with those layers whole on every rank of tp"
        yield f"tp={point.tp} with {m.not_shared_by_tp} is not priced: use tp=1{also}"


def _experts(job: Job, point: Point) -> Iterator[str]:
    m, experts = job.model, point.experts
    if experts == 1:
        return
    if m.mixture is None:
        yield f"experts={experts}: {m.name} has no experts; use experts=1"
    elif m.mixture.experts % experts:
        yield (
            f"experts={experts} does not divide the {m.mixture.experts} experts of {m.name};"
            f" use a divisor of {m.mixture.experts}"
        )
    elif point.replicas % experts:
        yield (
            f"experts={experts} over dp x ulysses x ring = {point.replicas} ranks; use a degree that divides"
            " them"
        )
    elif point.zero < job.stack.experts_from_zero:
        yield (
            f"experts={experts} with zero={point.zero}: seqmesh train spreads experts over ranks that share"
            " weights; use zero=2 or 3, or experts=1"
        )
    elif "pp" in point.used(job.axes)[1:-1]:
        yield (
            f"axes={','.join(job.axes)} with experts={experts}: pp lies between the ranks that share them;"
            " use an order with pp at an end, or experts=1"
        )


def _stages(job: Job, point: Point) -> Iterator[str]:
    layers = job.model.layers
    places = layers + (2 if job.stack.counts_ends else 0)
    if point.pp <= layers and point.pp * point.virtual > places:
        yield (
            f"pp={point.pp} x virtual={point.virtual} with {layers} layers leaves stages empty;"
            f" use virtual <= {places // point.pp}"
        )
    if point.pipeline != "1f1b" and point.pp == 1:
        yield f"pipeline={point.pipeline} with pp=1 has no stages; use pp >= 2, or pipeline=1f1b"
    if (point.virtual > 1) != (point.pipeline == "interleaved"):
        yield (
            f"pipeline={point.pipeline} with virtual={point.virtual}: stages are interleaved where a rank has"
            " several; use pipeline=interleaved and virtual >= 2, or neither"
        )


def _tokens(job: Job, point: Point) -> Iterator[str]:
    if point.sp > job.seq_len:
        yield (f"ulysses x ring = {point.sp} ranks share {job.seq_len} tokens; use at most {job.seq_len}")
    elif job.seq_len % (point.tp * point.sp) and point.tp > 1:
        yield (
            f"tp={point.tp} with its sequence parallelism does not divide {job.seq_len} tokens over"
            f" {point.sp} ranks; use a length that is a multiple of {point.tp * point.sp}, or tp=1"
        )


def _sequences(job: Job, point: Point) -> Iterator[str]:
    if job.global_batch % (point.dp * point.micro_batch):
        yield (
            f"dp={point.dp} x micro_batch={point.micro_batch} does not divide"
            f" global_batch={job.global_batch}; use degrees whose product divides {job.global_batch}"
        )
    elif point.pipeline == "interleaved" and job.micro_batches(point) % point.pp:
        yield (
            f"pipeline=interleaved with {job.micro_batches(point)} micro-batches on pp={point.pp}: it takes"
            f" {point.pp} at a time round the stages; use a batch that makes a multiple of {point.pp}"
        )


def _micro_batch(job: Job, point: Point) -> Iterator[str]:
    if job.max_micro_batch is not None and point.micro_batch > job.max_micro_batch:
        yield (
            f"micro_batch={point.micro_batch} is above the limit of {job.max_micro_batch};"
            " raise --max-micro-batch, or use a smaller one"
        )
    documents = len(job.documents) * point.micro_batch // job.global_batch
    if documents > MOST_DOCUMENTS:
        yield (
            f"micro_batch={point.micro_batch} packs {documents} documents in a row, and the planner lays out"
            f" at most {MOST_DOCUMENTS}; use a smaller one"
        )


def _pool(job: Job, point: Point) -> Iterator[str]:
    """One pool is a row of several sequences' documents on the only ring."""
    what = f"pool={str(point.pool).lower()}"
    if point.pool == is_pool(job, point):
        return
    if not point.pool:
        yield (
            f"{what} with dp=1, ring={point.ring} and micro_batch={point.micro_batch}: documents of several"
            " sequences in a row on one ring are a pool; use pool=true, or micro_batch=1"
        )
    elif not job.documents:
        yield f"{what} without documents has nothing to place; add --documents, or use pool=false"
    elif job.layout not in ("auto", "balanced"):
        yield f"{what} with layout={job.layout}: a pool's layout is balanced; use it, or auto, or pool=false"
    elif point.dp > 1:
        ranks = point.dp * point.ring
        yield (
            f"{what} with dp={point.dp} and ring={point.ring}: a pool is one ring of all of them;"
            f" use dp=1,ring={ranks}"
        )
    elif point.ring == 1:
        yield f"{what} with ring=1: a pool spreads documents over a ring; use ring >= 2, or pool=false"
    else:
        yield (
            f"{what} with micro_batch=1: a row of one sequence pools nothing; use micro_batch >= 2 (a larger"
            " --global-batch), or pool=false"
        )


def _savers(point: Point) -> Iterator[str]:
    """ZeRO and offload that would have nothing to work on."""
    if point.zero > 1 and point.replicas == 1:
        yield (f"zero={point.zero} with dp x ulysses x ring = 1 has nothing to shard over; use zero=0 or 1")
    if point.offloads_activations and point.checkpointing == "none":
        yield (
            f"offload={point.offload} moves checkpoints to the host but checkpointing=none makes none;"
            " use checkpointing=full"
        )
    if point.offloads_optimizer and point.zero == 0 and point.replicas > 1:
        yield f"offload={point.offload} with zero=0 would step the whole model on every host; use zero >= 1"
