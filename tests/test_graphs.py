"""Sets of graphs: reading, packing, features, views, encoder, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv, global_add_pool
from torch_geometric.utils import dropout_node, to_networkx

from hcl import graphs
from hcl.graphs import GraphBatch, families, sets, views
from hcl.graphs.batch import spans
from hcl.graphs.gin import GIN, Raw
from hcl.imagesets import DamagedDataError

MUTAG = Path(os.environ.get("HCL_DATA", "data")) / "tudataset" / "MUTAG"
needs_mutag = pytest.mark.skipif(not MUTAG.exists(), reason="MUTAG is not in HCL_DATA")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(n, y=0, **more):
    """A circle of n nodes as PyTorch Geometric has it."""
    nodes = torch.arange(n)
    edges = torch.stack([nodes, nodes.roll(-1)])
    return Data(edge_index=torch.cat([edges, edges.flip(0)], dim=1), y=y, num_nodes=n, **more)


def point(y=0, **more):
    return Data(edge_index=torch.zeros(2, 0, dtype=torch.long), y=y, num_nodes=1, **more)


@pytest.fixture
def odd():
    """A ring, a point, a pair that is not joined, and a larger ring: four graphs."""
    apart = Data(edge_index=torch.zeros(2, 0, dtype=torch.long), num_nodes=2, y=1)
    return sets.of_pyg([ring(5), point(1), apart, ring(7)])


def as_pyg(found, place):
    """One graph of a GraphBatch as PyTorch Geometric's Data, with its own node numbers."""
    mine = found.batch == place
    first = int(mine.nonzero()[0])
    edges = found.edge_index[:, mine[found.edge_index[0]]] - first
    return Data(x=found.x[mine], edge_index=edges, num_nodes=int(mine.sum()))


def pairs(found):
    return set(map(tuple, found.edge_index.T.tolist()))


# --- packing


def test_spans():
    found = spans(torch.tensor([4, 0, 7]), torch.tensor([2, 0, 3]))
    assert found.tolist() == [4, 5, 7, 8, 9]
    assert not len(spans(torch.zeros(0).long(), torch.zeros(0).long()))


def test_taking_graphs_is_what_pytorch_geometric_batches():
    data = graphs.load_families(n_graphs=12)
    whole = [as_pyg(data.graphs, g) for g in range(12)]
    rows = torch.tensor([7, 0, 11, 7])
    wanted = Batch.from_data_list([whole[r] for r in rows.tolist()])
    found = data.inputs(rows)
    assert torch.equal(found.x, wanted.x)
    assert torch.equal(found.edge_index, wanted.edge_index)
    assert torch.equal(found.batch, wanted.batch)
    assert found.num_graphs == wanted.num_graphs == 4


def test_graphs_without_edges_can_be_taken(odd):
    found = odd.graphs.take(torch.tensor([1, 2, 0]))
    assert found.nodes.tolist() == [1, 2, 5]
    assert found.edges.tolist() == [0, 0, 10]
    assert int(found.edge_index.min()) == 3
    none = odd.graphs.take(torch.tensor([2]))
    assert none.edge_index.shape == (2, 0)
    assert none.num_graphs == 1


def test_joined_are_these_then_those(odd):
    one, two = odd.graphs.take(torch.tensor([0, 1])), odd.graphs.take(torch.tensor([2, 3]))
    both = one.joined(two)
    whole = odd.graphs
    assert torch.equal(both.edge_index, whole.edge_index)
    assert torch.equal(both.batch, whole.batch)
    assert torch.equal(both.x, whole.x)
    assert both.num_graphs == 4


# --- TU sets


def write_tu(folder, name, *, sizes, edges, labels, node_labels=None):
    """A set in the raw TU layout; edges are numbered from 0 over all graphs, one way each."""
    raw = folder / "tudataset" / name / "raw"
    raw.mkdir(parents=True)
    both = [*edges, *[(b, a) for a, b in edges]]
    (raw / f"{name}_A.txt").write_text("".join(f"{a + 1}, {b + 1}\n" for a, b in both))
    indicator = [g + 1 for g, n in enumerate(sizes) for _ in range(n)]
    (raw / f"{name}_graph_indicator.txt").write_text("".join(f"{g}\n" for g in indicator))
    (raw / f"{name}_graph_labels.txt").write_text("".join(f"{y}\n" for y in labels))
    if node_labels:
        (raw / f"{name}_node_labels.txt").write_text("".join(f"{w}\n" for w in node_labels))
    return raw


EDGES = [(0, 1), (1, 2), (3, 4)]  # a path of three, a pair, a point, three apart


def test_a_set_in_the_raw_layout_is_read(tmp_path):
    write_tu(tmp_path, "MUTAG", sizes=[3, 2, 1, 3], edges=EDGES, labels=[1, -1, 1, -1],
             node_labels=[0, 2, 0, 1, 1, 2, 0, 0, 0])  # fmt: skip
    data = graphs.load("mutag", root=tmp_path)
    assert data.graphs.nodes.tolist() == [3, 2, 1, 3]
    assert data.graphs.edges.tolist() == [4, 2, 0, 0]
    assert pairs(data.graphs) == {(0, 1), (1, 0), (1, 2), (2, 1), (3, 4), (4, 3)}
    assert data.y_train.tolist() == [1, 0, 1, 0]
    assert data.graphs.x.argmax(1).tolist() == [0, 2, 0, 1, 1, 2, 0, 0, 0]
    assert data.graphs.x.sum(1).eq(1).all()
    assert data.classes == ("0", "1")
    assert data.cross_validated
    ones = graphs.load("mutag", root=tmp_path, features="ones")
    assert torch.equal(ones.graphs.x, data.graphs.x)  # there are labels


@pytest.mark.parametrize("features", ["released", "degree"])
def test_without_node_labels_the_degree_is_the_feature(tmp_path, features):
    write_tu(tmp_path, "IMDB-BINARY", sizes=[3, 2, 1, 3], edges=EDGES, labels=[1, 2, 1, 2])
    data = graphs.load("imdb-binary", root=tmp_path, features=features)
    wanted = [dict(g.degree) for g in (nx.path_graph(3), nx.path_graph(2))]
    degrees = [d for g in wanted for d in g.values()] + [0, 0, 0, 0]
    assert data.graphs.x.argmax(1).tolist() == degrees
    assert data.graphs.x.shape == (9, 3)
    ones = graphs.load("imdb-binary", root=tmp_path, features="ones")
    assert ones.graphs.x.tolist() == [[1.0]] * 9


def test_large_degrees_are_a_number(monkeypatch):
    star = nx.star_graph(1000)
    edges = np.array(star.edges()).T
    star = Data(edge_index=torch.from_numpy(np.hstack([edges, edges[::-1]])), y=0, num_nodes=1001)
    found = sets.of_pyg([star, ring(9, 1)]).graphs.x
    degrees = np.array([1000] + [1] * 1000 + [2] * 9)
    wanted = (degrees - degrees.mean()) / degrees.std(ddof=1)
    np.testing.assert_allclose(found[:, 0].numpy(), wanted, rtol=1e-4)
    smaller = nx.star_graph(999)
    edges = np.array(smaller.edges()).T
    both = torch.from_numpy(np.hstack([edges, edges[::-1]]))
    assert sets.of_pyg([Data(edge_index=both, y=0, num_nodes=1000)]).graphs.x.shape == (1000, 1000)


@needs_mutag
def test_mutag_is_as_pytorch_geometrics_own_class_has_it(tmp_path):
    from torch_geometric.datasets import TUDataset

    (tmp_path / "MUTAG").mkdir()
    (tmp_path / "MUTAG" / "raw").symlink_to(MUTAG / "raw")
    theirs = TUDataset(str(tmp_path), "MUTAG")
    ours = graphs.load("mutag", root=MUTAG.parent.parent)
    assert len(theirs) == len(ours.x_train) == 188
    wanted = Batch.from_data_list(list(theirs))
    assert torch.equal(ours.graphs.edge_index, wanted.edge_index)
    assert torch.equal(ours.graphs.x, wanted.x)
    assert torch.equal(ours.graphs.batch, wanted.batch)
    assert torch.equal(ours.y_train, wanted.y)
    assert ours.graphs.nodes.float().mean().item() == pytest.approx(17.93, abs=0.01)


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"name='mutagg': choose one of mutag, ptc_mr, enzymes,"):
        graphs.load("mutagg")
    with pytest.raises(ValueError, match=r"name='MUTAG': choose one of mutag"):
        graphs.download("MUTAG")


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hcl data proteins.*HCL_DATA"):
        graphs.load("proteins", root=tmp_path)


@pytest.mark.parametrize("what", ["A", "graph_indicator", "graph_labels"])
@pytest.mark.parametrize("damage", ["gone", "cut", "words"])
def test_a_damaged_set_is_called_that(tmp_path, what, damage):
    raw = write_tu(tmp_path, "PTC_MR", sizes=[3, 2], edges=EDGES, labels=[0, 1])
    path = raw / f"PTC_MR_{what}.txt"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("" if damage == "cut" else "no numbers\n")
    with pytest.raises(DamagedDataError, match=r"damaged or incomplete.*hcl data ptc_mr"):
        graphs.load("ptc_mr", root=tmp_path)


def test_download_asks_pytorch_geometric_and_says_where(tmp_path, monkeypatch):
    from torch_geometric import datasets

    asked = []
    monkeypatch.setattr(datasets, "TUDataset", lambda *args: asked.append(args))
    assert graphs.download("imdb-multi", tmp_path) == tmp_path / "tudataset" / "IMDB-MULTI"
    assert asked == [(str(tmp_path / "tudataset"), "IMDB-MULTI")]


# --- graphs of one's own


def test_graphs_without_edges_or_with_one_node_go_through(odd):
    assert odd.graphs.x.argmax(1).tolist() == [2] * 5 + [0, 0, 0] + [2] * 7
    assert odd.labels.tolist() == [0, 1, 1, 0]
    data = graphs.data.of_set("mine", odd)
    first, second = data.views(data.x_train, generator())
    net = data.encoder("gin")
    assert net(first).shape == net(second).shape == (4, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda: [], "graphs: none given"),
     (lambda: [ring(3), Data(num_nodes=0, y=0)], r"graphs\[1\]: must have at least one node"),
     (lambda: [ring(3, None)], r"graphs\[0\]: must have .* a label y"),
     (lambda: [ring(3), ring(3, torch.tensor([0, 1, 0]))], r"graphs\[1\]: y has 3 entries"),
     (lambda: [ring(3, x=torch.ones(3))], r"x is \(3,\), must be \(3, F\)"),
     (lambda: [ring(3, x=torch.ones(5, 2))], r"x is \(5, 2\), must be \(3, F\)"),
     (lambda: [Data(num_nodes=2, y=0)], "edge_index is None"),
     (lambda: [Data(edge_index=torch.tensor([[0, 2], [2, 0]]), num_nodes=2, y=0), ring(3)],
      r"graphs\[0\]: edge_index must number nodes 0 to 1"),
     (lambda: [Data(edge_index=torch.tensor([[1], [0]]), num_nodes=2, y=0)], "of one direction"),
     (lambda: [ring(3), ring(3, x=torch.ones(3, 2))], "node features of"),
     (lambda: [ring(3, x=torch.ones(3, 1)), ring(3, x=torch.ones(3, 2))], "node features of")],
)  # fmt: skip
def test_graphs_of_ones_own_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sets.of_pyg(change())


def test_an_unknown_kind_of_features_is_refused(tmp_path):
    for attempt in (lambda: sets.of_pyg([ring(3)], features="label"),
                    lambda: graphs.load("mutag", root=tmp_path, features="label")):  # fmt: skip
        with pytest.raises(ValueError, match="features='label': choose one of released, degree"):
            attempt()


def test_features_that_are_given_are_kept():
    x = torch.rand(3, 2)
    assert torch.equal(sets.of_pyg([ring(3, x=x)]).graphs.x, x)
    assert sets.of_pyg([ring(3, x=x)], features="degree").graphs.x.shape == (3, 3)


# --- held-out graphs


def test_held_out_graphs_keep_the_proportions_and_are_of_the_seed():
    data = graphs.load_families(n_graphs=60, held_out=0.2)
    assert not data.cross_validated
    assert (data.y_test.bincount() == 2).all()
    assert (data.y_train.bincount() == 8).all()
    assert sorted([*data.x_train.tolist(), *data.x_test.tolist()]) == list(range(60))
    whole = graphs.load_families(n_graphs=60)
    assert torch.equal(whole.y_train[data.x_test], data.y_test)
    found = sets.GraphSet(whole.graphs, whole.y_train)
    one, again, other = (
        graphs.data.of_set("g", found, seed=s, held_out=0.2).x_test.tolist() for s in (0, 0, 1)
    )
    assert one == again != other


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, 0.01])
def test_a_part_that_cannot_be_held_out_is_refused(share):
    with pytest.raises(ValueError, match=f"held_out={share}: "):
        graphs.load_families(n_graphs=60, held_out=share)


def test_a_class_of_one_graph_cannot_be_split():
    found = sets.of_pyg([ring(3, 0), ring(4, 0), ring(5, 1)])
    with pytest.raises(ValueError, match=r"held_out=0\.5: .*(class|group).*(least|few)"):
        graphs.data.of_set("mine", found, held_out=0.5)


# --- synthetic families


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_families_have_one_size_and_two_edges_for_each_node(noise):
    data = graphs.load_families(n_graphs=600, noise=noise)
    assert torch.equal(data.graphs.edges, 4 * data.graphs.nodes)
    for label in range(6):
        mine = data.y_train == label
        assert int(mine.sum()) == 100
        assert data.graphs.nodes[mine].float().mean().item() == pytest.approx(30, abs=2)
    assert data.classes == tuple(families.FAMILIES)


def test_the_smallest_graphs_can_be_drawn():
    data = graphs.load_families(n_graphs=60, least=8, most=9)
    assert torch.equal(data.graphs.edges, 4 * data.graphs.nodes)


def test_each_family_is_what_it_is_called():
    sizes, edges, labels = families.draw(60, noise=0.0)
    by_name = {name: [] for name in families.FAMILIES}
    for size, edge, label in zip(sizes, edges, labels.tolist(), strict=True):
        graph = nx.empty_graph(size)
        graph.add_edges_from(edge.T.tolist())
        by_name[list(families.FAMILIES)[label]].append(graph)
    assert all(set(dict(g.degree).values()) == {4} for g in by_name["regular"])
    spread = {n: np.mean([np.var(list(dict(g.degree).values())) for g in gs])
              for n, gs in by_name.items()}  # fmt: skip
    assert max(spread, key=spread.get) == "preferential"
    triangles = {n: np.mean([nx.transitivity(g) for g in gs]) for n, gs in by_name.items()}
    for name in ("geometric", "small world"):
        assert triangles[name] > 2 * triangles["uniform"]
    halves = []
    for graph in by_name["blocks"]:
        n = len(graph) // 2
        halves.append(np.mean([(a < n) == (b < n) for a, b in graph.edges()]))
    assert np.mean(halves) > 0.8


def test_noise_replaces_edges_and_keeps_their_number():
    calm, noisy = (families.draw(12, noise=n, seed=4)[1] for n in (0.0, 1.0))
    assert calm[0].shape == noisy[0].shape
    for edges in noisy:
        once = {tuple(sorted(e)) for e in edges.T.tolist()}
        assert 2 * len(once) == edges.shape[1]  # no pair twice
        assert all(a != b for a, b in once)
    regular = [graphs.load_families(n_graphs=60, noise=n) for n in (0.0, 0.3)]
    apart = [d.graphs.x[d.graphs.batch == int((d.y_train == 1).nonzero()[0])] for d in regular]
    assert len(apart[0].unique(dim=0)) == 1 < len(apart[1].unique(dim=0))


def test_synthetic_graphs_are_of_the_seed_alone():
    torch.manual_seed(0)
    one = graphs.load_families(n_graphs=30, seed=3)
    torch.manual_seed(1)
    again, other = (graphs.load_families(n_graphs=30, seed=s) for s in (3, 4))
    assert torch.equal(one.graphs.edge_index, again.graphs.edge_index)
    assert torch.equal(one.y_train, again.y_train)
    assert not torch.equal(one.y_train, other.y_train)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_graphs": 5}, "n_graphs=5: at least 6"), ({"least": 7}, r"nodes=\(7, 40\)"),
     ({"least": 30, "most": 20}, r"nodes=\(30, 20\)"), ({"noise": 1.5}, "noise=1.5: a share"),
     ({"augmentation": "crop"}, "augmentation='crop': choose one of nodes, edges, features,"),
     ({"strength": -0.5}, r"strength=-0\.5: a share")],
)  # fmt: skip
def test_options_of_the_families_that_are_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        graphs.load_families(**options)


# --- views


@pytest.fixture(scope="module")
def whole():
    return graphs.load_families(n_graphs=60, least=8, most=30).graphs


@pytest.mark.parametrize("kind", [*views.KINDS, "mixed"])
def test_a_view_is_of_the_same_graphs_undirected_and_without_loops(whole, kind):
    found = views.augment(whole, kind, 0.3, generator())
    assert found.num_graphs == 60
    assert found.nodes.min() >= 1
    assert (found.batch.diff() >= 0).all()
    assert found.x.shape == (len(found.batch), whole.x.shape[1])
    first, second = found.edge_index
    assert torch.equal(found.batch[first], found.batch[second])
    assert (found.batch[first].diff() >= 0).all()
    assert pairs(found) == {(b, a) for a, b in pairs(found)}
    assert (first != second).all()
    assert len(pairs(found)) == len(first)


@pytest.mark.parametrize("kind", [*views.KINDS, "mixed", "none"])
def test_at_strength_zero_nothing_changes(whole, kind):
    found = views.augment(whole, kind, 0.0, generator())
    assert torch.equal(found.x, whole.x)
    assert pairs(found) == pairs(whole)
    assert torch.equal(found.batch, whole.batch)


@pytest.mark.parametrize("kind", ["nodes", "subgraph"])
def test_nodes_left_out_are_a_share_of_each_graph_and_one_stays(whole, kind):
    found = views.augment(whole, kind, 0.25, generator())
    assert torch.equal(found.nodes, whole.nodes - (whole.nodes * 0.25).floor().long())
    assert (views.augment(whole, kind, 1.0, generator()).nodes == 1).all()


def test_nodes_left_out_leave_what_pytorch_geometric_would(whole):
    """Of the nodes that stay, every edge, renumbered: its dropout_node and our numbers."""
    marked = GraphBatch(
        torch.arange(len(whole.x))[:, None].float(), whole.edge_index, whole.batch, 60
    )
    found = views.augment(marked, "nodes", 0.4, generator())
    kept = found.x[:, 0].long()
    old = torch.stack([kept[found.edge_index[0]], kept[found.edge_index[1]]])
    mask = torch.zeros(len(whole.x), dtype=torch.bool)
    mask[kept] = True
    inside = mask[whole.edge_index].all(0)
    assert pairs(GraphBatch(whole.x, old, whole.batch, 60)) == set(
        map(tuple, whole.edge_index[:, inside].T.tolist())
    )
    _, _, theirs = dropout_node(whole.edge_index, 0.4, len(whole.x))
    assert theirs.float().mean().item() == pytest.approx(mask.float().mean().item(), abs=0.06)


def test_a_subgraph_is_connected_and_a_ball_around_its_centre():
    rings = sets.of_pyg([ring(20), ring(12), ring(8)]).graphs
    found = views.augment(rings, "subgraph", 0.5, generator())
    for place in range(3):
        graph = to_networkx(as_pyg(found, place), to_undirected=True)
        assert nx.is_connected(graph)
        assert sorted(dict(graph.degree).values())[:2] == [1, 1]  # an arc of the ring


def test_hops_are_shortest_paths(whole):
    centre = torch.zeros(len(whole.x), dtype=torch.bool)
    centre[whole.first_node] = True
    found = views._hops(whole, centre)
    graph = nx.empty_graph(len(whole.x))
    graph.add_edges_from(whole.edge_index.T.tolist())
    wanted = {}
    for first in whole.first_node.tolist():
        wanted |= nx.single_source_shortest_path_length(graph, first)
    assert {n: int(h) for n, h in enumerate(found) if n in wanted} == wanted
    assert all(found[n] == len(whole.x) for n in range(len(whole.x)) if n not in wanted)


def test_replaced_edges_are_about_the_share_and_never_join_two_graphs(whole):
    found = views.augment(whole, "edges", 0.3, generator())
    old, new = pairs(whole), pairs(found)
    assert len(old & new) / len(old) == pytest.approx(0.72, abs=0.06)  # some come back by chance
    assert len(old) * 0.85 < len(new) <= len(old)
    assert torch.equal(found.x, whole.x)
    everything = views.augment(whole, "edges", 1.0, generator())
    assert len(pairs(everything) & old) / len(old) < 0.35


def test_blank_features_are_about_the_share(whole):
    found = views.augment(whole, "features", 0.3, generator())
    assert (found.x.sum(1) == 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(found.edge_index, whole.edge_index)
    assert torch.equal(found.x[found.x.sum(1) > 0], whole.x[found.x.sum(1) > 0])
    assert (views.augment(whole, "features", 1.0, generator()).x == 0).all()


def test_a_mixture_deals_every_graph_one_change():
    one = sets.of_pyg([ring(24)] * 400).graphs
    found = views.augment(one, "mixed", 0.5, generator())
    fewer = found.nodes < 24
    blank = torch.zeros(400).index_add(0, found.batch, (found.x.sum(1) == 0).float()) > 0
    moved = torch.tensor([
        (found.edge_index[:, found.batch[found.edge_index[0]] == g].diff(dim=0).abs()
         % found.nodes[g] > 1).any().item() for g in range(400)
    ])  # fmt: skip
    assert fewer.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert blank.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert not (fewer & blank).any()
    assert (moved & ~fewer & ~blank).float().mean().item() == pytest.approx(0.25, abs=0.08)


def test_views_are_of_the_generator_alone_and_two_differ():
    data = graphs.load_families(n_graphs=30)
    rows = torch.arange(30)
    one, two = data.views(rows, generator())
    again, _ = data.views(rows, generator())
    assert pairs(one) == pairs(again)
    assert pairs(one) != pairs(two)
    state = torch.random.get_rng_state()
    data.views(rows, generator())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_second_view_may_be_of_another_graph():
    data = graphs.load_families(n_graphs=30, augmentation="none")
    one, two = data.views(torch.tensor([0, 1]), generator(), torch.tensor([4, 5]))
    assert torch.equal(one.x, data.inputs(torch.tensor([0, 1])).x)
    assert torch.equal(two.edge_index, data.inputs(torch.tensor([4, 5])).edge_index)


# --- encoder


def test_the_encoder_is_layers_of_gin_side_by_side(whole):
    torch.manual_seed(0)
    net = GIN(whole.x.shape[1], layers=2, hidden=8)
    convs, h, wanted = [], whole.x, []
    for conv in net.convs:
        convs.append(GINConv(conv.nn))
    for conv, norm in zip(convs, net.norms, strict=True):
        h = norm(conv(h, whole.edge_index).relu())
        wanted.append(h)
    wanted = torch.cat(wanted, dim=1)
    nodes, pooled = net.both(whole)
    torch.testing.assert_close(nodes, wanted)
    torch.testing.assert_close(pooled, global_add_pool(wanted, whole.batch, 60))
    torch.testing.assert_close(net(whole), pooled)
    assert net.out_dim == 16


def test_a_convolution_is_the_formula_node_by_node():
    data = sets.of_pyg([ring(5), point(1)]).graphs
    net = GIN(data.x.shape[1], layers=1, hidden=4)
    first, _, second = net.convs[0].nn
    for n in range(6):
        near = [int(b) for a, b in data.edge_index.T if int(a) == n]
        total = data.x[n] + sum((data.x[m] for m in near), torch.zeros_like(data.x[n]))
        wanted = second(first(total).relu())
        found = net.convs[0](data.x, data.edge_index)[n]
        torch.testing.assert_close(found, wanted)


def test_the_encoder_reads_batches_of_pytorch_geometric(whole):
    net = GIN(whole.x.shape[1]).eval()
    theirs = Batch.from_data_list([as_pyg(whole, g) for g in (3, 5)])
    torch.testing.assert_close(net(theirs), net(whole.take(torch.tensor([3, 5]))))


def test_a_graphs_embedding_does_not_depend_on_its_company_or_its_numbering(whole):
    net = GIN(whole.x.shape[1]).eval()
    alone, among = net(whole.take(torch.tensor([9]))), net(whole)[9:10]
    torch.testing.assert_close(alone, among)
    graph = as_pyg(whole, 9)
    order = torch.randperm(graph.num_nodes)
    moved = GraphBatch(graph.x[order], order.argsort()[graph.edge_index],
                       torch.zeros(graph.num_nodes).long(), 1)  # fmt: skip
    torch.testing.assert_close(net(moved), alone)


def test_it_starts_as_the_released_code_does():
    net = GIN(40, hidden=30)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.bias == 0).all()
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert bound * 0.9 < module.weight.abs().max() <= bound


def test_raw_sums_count_the_labels(odd):
    found = Raw(3)(odd.graphs)
    assert found.tolist() == [[0, 0, 5], [1, 0, 0], [2, 0, 0], [0, 0, 7]]


def test_encoders_that_are_not_there_are_refused():
    data = graphs.load_families(n_graphs=12)
    with pytest.raises(ValueError, match="encoder='resnet18': graphs have gin, raw"):
        data.encoder("resnet18")
    with pytest.raises(ValueError, match="layers=0"):
        data.encoder("gin", layers=0)
    assert data.encoder("gin", layers=2, hidden=8).out_dim == 16


# --- without PyTorch Geometric


def test_the_losses_do_without_pytorch_geometric():
    code = (
        "import sys, hcl.losses, hcl.runs, hcl.graphs; "
        "sys.exit('torch_geometric' in sys.modules or 'networkx' in sys.modules and "
        "'hcl.graphs.families' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_where_it_is_missing_the_error_says_so():
    code = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "from hcl import graphs\n"
        "data = graphs.load_families(n_graphs=12)\n"
        "try: data.encoder('gin')\n"
        "except ImportError as error: sys.exit('pip install torch_geometric' not in str(error))\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
