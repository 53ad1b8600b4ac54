from __future__ import annotations

from pathlib import Path

import pytest

from rayva.redaction import redact
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, is_server, tracking_uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://u:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("https://host/path?access_token=abc&x=1", "https://host/path?access_token=***&x=1"),
        ("s3://bucket/a?X-Amz-Signature=abc", "s3://bucket/a?X-Amz-Signature=***"),
        ("cannot reach http://u:p@h/ and https://v:q@i/", "cannot reach http://***@h/ and https://***@i/"),
        ("http://u:pa/ss@host:5000/x", "http://***@host:5000/x"),
        ("http://u:p@s/s@host", "http://***@host"),
        ("http://u:a/b@h/,https://v:c/d@i/", "http://***@h/,https://***@i/"),
        ("http://host:5000/team@home", "http://host:5000/team@home"),
        ("s3://bucket/a:b@2x.png", "s3://bucket/a:b@2x.png"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("ann@example.org", "ann@example.org"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_the_default_is_a_file_under_the_storage(tmp_path: Path) -> None:
    assert tracking_uri(None, Storage(str(tmp_path))) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("name", ["a?b", "a#b"])
def test_a_path_that_sqlite_would_not_find_is_refused(name: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / name))
    with pytest.raises(TrackingError, match=r"has \? or # in it"):
        tracking_uri(None, storage)
    assert tracking_uri("http://host:5000", storage) == "http://host:5000"


def test_storage_elsewhere_needs_a_server() -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri=http"):
        tracking_uri(None, Storage("memory://run"))
    assert tracking_uri("http://host:5000", Storage("memory://run")) == "http://host:5000"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("htp://host:5000", "'htp' is not known"),
        ("ftp://host/x", "'ftp' is not known"),
        ("mlruns", "not a URI"),
        ("/data/mlruns", "not a URI"),
        ("http://", "no host"),
        ("sqlite://", "no file"),
        ("sqlite:////nowhere/at/all/mlflow.db", "no folder /nowhere/at/all"),
        ("htp://ann:s3cret@host", "htp://[*]{3}@host"),
    ],
)
def test_a_uri_that_mlflow_cannot_use_is_refused_at_once(uri: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=says) as caught:
        tracking_uri(uri, Storage(str(tmp_path)))
    assert caught.value.remedy
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["postgresql://h/db", "mysql+pymysql://u:p@h/db", "databricks", "https://h"])
def test_other_stores_are_taken_as_they_are(uri: str, tmp_path: Path) -> None:
    assert tracking_uri(uri, Storage(str(tmp_path))) == uri
    assert is_server(uri) is uri.startswith("https")
