"""Device code over plain tensors: each kernel family has Triton kernels, a CPU path and a torch twin."""

from __future__ import annotations

from safecl.kernels.flat.calls import Segments as Segments
from safecl.kernels.flat.calls import adamw_step_ as adamw_step_
from safecl.kernels.flat.calls import ema_update_ as ema_update_
from safecl.kernels.flat.calls import fisher_accumulate_ as fisher_accumulate_
from safecl.kernels.flat.calls import fisher_penalty_ as fisher_penalty_
from safecl.kernels.flat.calls import penalized_grad_norm as penalized_grad_norm
from safecl.kernels.head.calls import LinearDistillOutput as LinearDistillOutput
from safecl.kernels.head.calls import linear_distill_loss as linear_distill_loss
from safecl.kernels.head.distill import distill_loss as distill_loss
from safecl.kernels.head.segments import SortedRows as SortedRows
from safecl.kernels.head.segments import sort_rows as sort_rows
from safecl.kernels.head.teachers import DenseTeacher as DenseTeacher
from safecl.kernels.head.teachers import LogitsTeacher as LogitsTeacher
from safecl.kernels.head.teachers import TopKTeacher as TopKTeacher
from safecl.kernels.head.topk import SlicedTopK as SlicedTopK
from safecl.kernels.head.topk import linear_topk as linear_topk
from safecl.kernels.lowrank import lowrank_fisher_penalty as lowrank_fisher_penalty
from safecl.kernels.ties.calls import BracketCounts as BracketCounts
from safecl.kernels.ties.calls import Trim as Trim
from safecl.kernels.ties.calls import count_bracket as count_bracket
from safecl.kernels.ties.calls import elected_sum_ as elected_sum_
