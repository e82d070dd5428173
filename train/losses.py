"""What is minimised: listwise or pointwise for the scores, four terms for lists that are read as
one text, and balance; for the vectors it is `kernels.info_nce`; and what a teacher's scores add."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# What a loss is multiplied by on its way back, and its gradients divided by, in a dtype whose
# smallest step (6e-8) the gradients of single tokens would fall below: fixed, a power of two.
LOSS_SCALE = {torch.float16: 4096.0}


def listwise(scores: Tensor) -> Tensor:
    """Mean over groups of -log softmax(score) at the positive, which is the first of its group.

    Args:
        scores: (groups, size) logits.
    """
    return F.cross_entropy(
        scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    )


def bce(scores: Tensor) -> Tensor:
    """Binary cross-entropy of each pair; the positive weighs as much as its group's negatives.

    Args:
        scores: (groups, size) logits, the positive first.
    """
    target = torch.zeros_like(scores)
    target[:, 0] = 1
    weight = scores.new_tensor(scores.shape[1] - 1)
    return F.binary_cross_entropy_with_logits(scores, target, pos_weight=weight)


def contrast(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """InfoNCE within each list: mean of -log softmax(q . d / temperature) at the positive, which is
    the first.

    The rank loss of jina-reranker-v3 (arXiv 2509.25085, eq. 2); its dual loss, with the queries
    read before the documents.

    Args:
        queries: (B, W), documents: (B, K, W), of length 1.
    """
    return listwise(torch.einsum("bw,bkw->bk", queries, documents) / temperature)


def dispersive(documents: Tensor, temperature: float) -> Tensor:
    """Mean over lists of log(sum over pairs of exp(d . d' / temperature) / (K - 1)): it drives a
    list's documents apart (arXiv 2509.25085, eq. 3).

    Args:
        documents: (B, K, W) of length 1, K >= 2; the positive is one of them.
    """
    count = documents.shape[1]
    scores = documents @ documents.mT / temperature  # (B, K, K)
    row, column = torch.triu_indices(count, count, offset=1, device=scores.device)
    return (scores[:, row, column].logsumexp(-1) - math.log(count - 1)).mean()


def similarity(documents: Tensor, altered: Tensor, temperature: float) -> Tensor:
    """Mean of -log softmax at a document's altered copy, against the list's other documents
    (arXiv 2509.25085, section 4.1, which gives no formula).

    Args:
        documents, altered: (B, K, W) of length 1, the same documents in the same order.
    """
    scores = documents @ documents.mT / temperature  # (B, K, K), a document with the others
    own = (documents * altered).sum(-1) / temperature
    itself = torch.eye(documents.shape[1], dtype=torch.bool, device=scores.device)
    return (torch.where(itself, own[..., None], scores).logsumexp(-1) - own).mean()


RERANKING = {"listwise": listwise, "bce": bce}


def ranknet(scores: Tensor, grades: Tensor) -> Tensor:
    """Mean over all pairs of documents of one list with grade_i > grade_j of
    log(1 + exp(score_j - score_i)) (RankNet, Burges et al. 2005); 0 where there is no such pair.

    Args:
        scores, grades: (lists, size); of the grades only their order counts.
    """
    better = grades[:, :, None] > grades[:, None, :]  # (lists, size, size): i above j
    behind = scores[:, None, :] - scores[:, :, None]
    return F.softplus(behind)[better].sum() / better.sum().clamp(min=1)


def distill_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over groups of KL(softmax(teacher / T) || softmax(student / T)).

    T^2 keeps the gradient's size whatever T (arXiv 1503.02531, section 2.1). A constant added to
    all scores of a group, the teacher's or the student's, changes nothing.

    Args:
        student, teacher: (groups, size) logits of the same texts. temperature: T > 0.
    """
    log_student = (student / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return temperature**2 * divergence.mean()


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the margins between the positive, which is the first of its
    group, and each negative (arXiv 2010.02666, equation 6).

    Args:
        student, teacher: (groups, size) logits of the same texts.
    """
    own, wanted = (scores[:, :1] - scores[:, 1:] for scores in (student, teacher))
    return F.mse_loss(own, wanted)


def distillation(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """`distill_kl` ("kl") or `margin_mse` ("margin_mse", which has no temperature)."""
    if kind == "kl":
        return distill_kl(student, teacher, temperature)
    if kind == "margin_mse":
        return margin_mse(student, teacher)
    raise ValueError(f"distill must be kl or margin_mse, got {kind!r}")


def balance(weights: list[Tensor], kind: str) -> Tensor:
    """Load balance: mean over layers of E sum_i f_i P_i, 1 when balanced (arXiv 2101.03961).

    P_i is the mean weight of expert i over the whole mixed batch (balanced within each task it
    would forbid routing by task). f_i is the mean weight again (`mean`), the share of texts whose
    largest weight it has (`argmax`), or the share of texts that use it, normalised (`support`).

    Args:
        weights: (B, E) of each layer.
    """
    terms = []
    for p in weights:
        mean = p.mean(0)
        if kind == "mean":
            f = mean
        elif kind == "argmax":
            f = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype).mean(0)
        elif kind == "support":
            used = (p > 0).to(p.dtype)
            f = (used / used.sum(-1, keepdim=True)).mean(0)
        else:
            raise ValueError(f"balance must be mean, argmax or support, got {kind!r}")
        terms.append(p.shape[-1] * (f * mean).sum())
    return torch.stack(terms).mean()
