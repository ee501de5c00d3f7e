"""Independent references: dense, float64, written from the papers without the library's parts."""

import torch
from small_merges import Statistics, dense, information

from orthomerge.merging import layer_seed


def ref_trim(delta, density):
    order = sorted(range(delta.numel()), key=lambda i: -abs(float(delta.flatten()[i])))
    out = torch.zeros(delta.numel(), dtype=torch.float64)
    for i in order[: int(density * delta.numel())]:
        out[i] = delta.flatten()[i]
    return out.view_as(delta)


def ref_elect(deltas, weights, frequency=False):
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [float(d.flatten()[place]) for d in deltas]
        votes = [(v > 0) - (v < 0) for v in values] if frequency else values
        positive = sum(votes) >= 0
        kept = [(v, w) for v, w in zip(values, weights, strict=True) if v and (v > 0) == positive]
        if kept:
            out.view(-1)[place] = sum(v * w for v, w in kept) / len(kept)
    return out


def ref_sum(deltas, weights):
    return sum(w * d for d, w in zip(deltas, weights, strict=True))


def ref_masks(layer, deltas, density):
    g = torch.Generator().manual_seed(layer_seed(0, layer))
    return [torch.bernoulli(torch.full(d.shape, density), generator=g).double() for d in deltas]


def ref_dare(layer, deltas, density):
    masks = ref_masks(layer, deltas, density)
    return [d * m / density for d, m in zip(deltas, masks, strict=True)]


def ref_band(delta, density, gamma):
    n = delta.numel()
    order = sorted(range(n), key=lambda i: -abs(float(delta.flatten()[i])))
    out = torch.zeros(n, dtype=torch.float64)
    for i in order[int(gamma * n) : int(gamma * n) + int(density * n)]:
        out[i] = delta.flatten()[i]
    return out.view_as(delta)


def ref_svd(deltas, weights, rank):
    U, s, Vh = torch.linalg.svd(ref_sum(deltas, weights))
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]


def ref_sce(deltas, weights, topk=1.0):
    stack = torch.stack([w * d for d, w in zip(deltas, weights, strict=True)])
    if topk < 1:
        variance = ((stack - stack.mean(0)) ** 2).mean(0).flatten()
        kept = variance.argsort(descending=True)[: int(topk * len(variance))]
        mask = torch.zeros_like(variance)
        mask[kept] = 1
        stack = stack * mask.view_as(stack[0])
    eta = [float((d**2).mean()) for d in stack]
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [float(d.flatten()[place]) for d in stack]
        positive = sum(values) >= 0
        kept = [(v, e) for v, e in zip(values, eta, strict=True) if v and (v > 0) == positive]
        if kept:
            out.view(-1)[place] = sum(v * e for v, e in kept) / sum(e for _, e in kept)
    return out


def ref_slerp(deltas, weights):
    a, b = deltas
    t = weights[1] / sum(weights)
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def ref_model_stock(deltas, weights):
    n = len(deltas)
    pairs = [
        float((deltas[i] * deltas[j]).sum() / deltas[i].norm() / deltas[j].norm())
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosine = max(sum(pairs) / len(pairs), 0)
    return n * cosine / (1 + (n - 1) * cosine) * ref_sum(deltas, weights) / sum(weights)


def ref_tsv(deltas, weights, ranks):
    share = min(deltas[0].shape) // len(deltas)
    us, ss, vs = [], [], []
    for d, w, r in zip(deltas, weights, ranks, strict=True):
        U, s, Vh = torch.linalg.svd(d)
        k = min(r, share)
        us.append(U[:, :k])
        ss.append(w * s[:k])
        vs.append(Vh[:k].T)

    def whiten(X):
        values, vectors = torch.linalg.eigh(X.T @ X)
        return X @ vectors @ torch.diag(values**-0.5) @ vectors.T

    return whiten(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ whiten(torch.cat(vs, 1)).T


def ref_iso(deltas, weights, ranks):
    U, s, Vh = torch.linalg.svd(ref_sum(deltas, weights))
    k = min(sum(ranks), len(s))
    return s[:k].mean() * U[:, :k] @ Vh[:k]


def ref_knots(deltas, weights, ranks, density):
    U, s, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = min(sum(ranks), len(s))
    blocks = (torch.diag(s[:k]) @ Vh[:k]).split(deltas[0].shape[1], dim=1)
    return U[:, :k] @ ref_elect([ref_trim(b, density) for b in blocks], weights)


def core_bases(adapters, layer):
    B = torch.cat([a[layer].scaling * a[layer].B for a in adapters], 1)
    A = torch.cat([a[layer].A for a in adapters], 0)
    return torch.linalg.svd(B, full_matrices=False)[0], torch.linalg.svd(A, full_matrices=False)[2]


def ref_core(adapters, layer, weights, density):
    U, Vh = core_bases(adapters, layer)
    core = [U.T @ d @ Vh.T for d in dense(adapters, layer)]
    return U @ ref_elect([ref_trim(m, density) for m in core], weights) @ Vh


def ref_ctm(deltas, weights, rank, beta, density):
    norms = torch.stack([torch.linalg.norm(d) for d in deltas])
    scaled = [
        d * (beta + (1 - beta) * norms.mean() / n) for d, n in zip(deltas, norms, strict=True)
    ]

    def top(total):
        values, vectors = torch.linalg.eigh(total)
        return float(values[-rank:].sum()), vectors.flip(1)[:, :rank]

    _, V = top(sum(d.T @ d for d in scaled))
    before, energy = -1.0, 0.0
    while energy - before > 1e-9 * energy:
        before = energy
        _, U = top(sum(d @ V @ V.T @ d.T for d in scaled))
        energy, V = top(sum(d.T @ U @ U.T @ d for d in scaled))
    core = [U.T @ d @ V for d in deltas]
    return U @ ref_elect([ref_trim(m, density) for m in core], weights) @ V.T


def ref_core_sce(adapters, layer, weights, density):
    U, Vh = core_bases(adapters, layer)
    core = [ref_trim(U.T @ d @ Vh.T, density) for d in dense(adapters, layer)]
    return U @ ref_sce(core, weights) @ Vh


def ref_tall(deltas, weights, tall_lambda):
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    total = sum(updates)
    return total, [(u.abs() >= tall_lambda * (total - u).abs()).double() for u in updates]


def ref_consensus(deltas, weights, tall_lambda, agree):
    total, masks = ref_tall(deltas, weights, tall_lambda)
    return (sum(masks) >= agree).double() * total


def ref_emr_unified(deltas, weights):
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        values = [w * float(d.flatten()[place]) for d, w in zip(deltas, weights, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        out.view(-1)[place] = sign * max([abs(v) for v in values if v * sign > 0], default=0.0)
    return out


def ref_emr_tasks(layers, weights):
    """The authors' `emr_merge`: per task one mask per weight, one rescaler for the whole model."""
    unified, tasks, scales = {}, [{} for _ in weights], []
    for name, deltas in layers.items():
        vectors = [w * d for d, w in zip(deltas, weights, strict=True)]
        flag = (sum(vectors) > 0).double() * 2 - 1
        largest = torch.zeros_like(flag)
        for vector in vectors:
            agreeing = ((vector * flag) > 0) * vector.abs()
            largest = torch.where(agreeing > largest, agreeing, largest)
        unified[name] = flag * largest
    for t, w in enumerate(weights):
        own = kept = 0.0
        for name, deltas in layers.items():
            mask = (w * deltas[t] * unified[name]) > 0
            tasks[t][name] = mask * unified[name]
            own += float((w * deltas[t]).abs().sum())
            kept += float(tasks[t][name].abs().sum())
        scales.append(own / kept)
    return [{n: s * v for n, v in task.items()} for s, task in zip(scales, tasks, strict=True)]


def ref_iso_cts(deltas, weights, ranks, fraction):
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    U, s, Vh = torch.linalg.svd(sum(updates), full_matrices=False)
    K = min(sum(ranks), len(s))
    each = round((K - int(K * fraction)) / len(updates))
    k = K - each * len(updates)
    us, ss, vs = [U[:, :k]], [s[:k]], [Vh[:k].T]
    for update in updates:
        rest = update - U[:, :k] @ U[:, :k].T @ update
        u, t, vh = torch.linalg.svd(rest, full_matrices=False)
        us.append(u[:, :each])
        ss.append(t[:each])
        vs.append(vh[:each].T)

    def orthonormal(X):
        P, _, Qh = torch.linalg.svd(X, full_matrices=False)
        return P @ Qh

    return torch.cat(ss).mean() * orthonormal(torch.cat(us, 1)) @ orthonormal(torch.cat(vs, 1)).T


def ref_knots_dare(layer, deltas, weights, ranks, density):
    U, s, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = min(sum(ranks), len(s))
    blocks = (torch.diag(s[:k]) @ Vh[:k]).split(deltas[0].shape[1], dim=1)
    return U[:, :k] @ ref_elect(ref_dare(layer, list(blocks), density), weights)


def ref_pico(adapters, layer, deltas, weights, merge_calibrated):
    B = torch.cat([a[layer].scaling * a[layer].B.double() for a in adapters], 1)
    U, s, _ = torch.linalg.svd(B)
    energy = torch.zeros(len(U), dtype=torch.float64)
    energy[: len(s)] = s**2
    C = U @ torch.diag(1 / (1 + (len(deltas) - 1) * energy / energy.sum())) @ U.T
    merged = merge_calibrated([C @ d for d in deltas], weights)
    wanted = sum(w * float(d.norm()) for d, w in zip(deltas, weights, strict=True))
    return wanted / merged.norm() * merged


def ref_robust(adapters, layer, weights, density, lambda_=2.0, att_ratio=0.2):
    """The authors' script: kth value as threshold, scales clamped from below, λ on A and on B."""

    def kept(matrix):
        kth = matrix.abs().flatten().kthvalue(int(matrix.numel() * (1 - density))).values
        return torch.where(matrix.abs() >= kth, matrix, 0.0)

    left, right, scales = [], [], []
    for a, w in zip(adapters, weights, strict=True):
        A, B = a[layer].A.double(), w * a[layer].scaling * a[layer].B.double()
        scale = A.abs().sum(1) / kept(A).abs().sum(1)
        scale = torch.where(scale.isfinite(), scale, 0.0)
        scales.append(scale.clamp(min=scale.sort().values[int(len(scale) * (1 - att_ratio))]))
        left.append(kept(B))
        right.append(kept(A))
    top = sum(b @ torch.diag(s) for b, s in zip(left, scales, strict=True))
    return (lambda_ * top / sum(scales)) @ (lambda_ * sum(right))


def ref_gram(layer, number, alpha, ridge):
    rows = Statistics(number).rows(layer)
    S = rows.T @ rows / len(rows)
    off = alpha * S + (1 - alpha) * torch.diag(S.diagonal())
    return off + ridge * S.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)


def ref_regmean(layer, deltas, weights, alpha, ridge, shares=None):
    grams = [ref_gram(layer, i, alpha, ridge) for i in range(len(deltas))]
    shares = shares or [1.0] * len(deltas)
    top = sum(c * w * d @ G for c, d, w, G in zip(shares, deltas, weights, grams, strict=True))
    return top @ torch.linalg.inv(sum(c * G for c, G in zip(shares, grams, strict=True)))


def ref_osrm_aware(layer, deltas, weights, rank=None):
    shares = [
        1 / float((Statistics(i).rows(layer) @ d.T).square().sum(1).mean())
        for i, d in enumerate(deltas)
    ]
    best = ref_regmean(layer, deltas, weights, 1.0, 1e-3, shares)
    if rank is None:
        return best
    grams = [ref_gram(layer, i, 1.0, 1e-3) for i in range(len(deltas))]
    L = torch.linalg.cholesky(sum(c * G for c, G in zip(shares, grams, strict=True)))
    U, s, Vh = torch.linalg.svd(best @ L, full_matrices=False)
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank] @ torch.linalg.inv(L)


def ref_fisher(layer, deltas, weights):
    F = [information(i)[layer] for i in range(len(deltas))]
    F = [f / f.mean() + 1e-6 for f in F]
    return sum(f * w * d for f, d, w in zip(F, deltas, weights, strict=True)) / sum(F)


def ref_wudi(deltas, weights, ridge):
    """Gradient descent to the minimum of the loss, by the normal equations of every output row."""
    updates = [w * d for d, w in zip(deltas, weights, strict=True)]
    grams = [u.T @ u / u.square().sum() for u in updates]
    span = torch.linalg.matrix_rank(torch.cat(updates))
    rho = ridge * float(sum(grams).diagonal().sum()) / int(span)
    eye = torch.eye(len(grams[0]), dtype=torch.float64)
    top = sum(u @ G for u, G in zip(updates, grams, strict=True)) + rho * sum(updates)
    return torch.linalg.solve(sum(grams) + rho * eye, top.T).T


def ref_wudi_published(deltas, weights, steps, learning_rate):
    """The published optimisation: Adam from the sum, the gradient by autograd."""
    updates = torch.stack([w * d for d, w in zip(deltas, weights, strict=True)])
    merged = updates.sum(0).requires_grad_()
    adam = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        inner = (merged - updates) @ updates.transpose(1, 2)
        loss = (inner.square().sum((1, 2)) / updates.square().sum((1, 2))).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return merged.detach()
