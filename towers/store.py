"""The object store: a folder, or a bucket on S3, GCS or Azure.

Deliberately does not know what is stored. The one place where obstore's errors become ours.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.exceptions import NotFoundError as ObjectNotFoundError
from obstore.exceptions import PreconditionError as ObjectPreconditionError
from obstore.store import LocalStore, ObjectStore, from_url

from towers.errors import ConflictError, InvalidInputError, NotFoundError, StoreUnavailableError

_REMOTE_SCHEMES: Mapping[str, str] = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
"""Scheme to the prefix of its provider's environment variables."""
_CONNECT_TIMEOUT = "5s"
_TIMEOUT = "60s"
_MAX_RETRIES = 3


class Store:
    """Immutable objects under one root. All methods block; call them off the event loop.

    All raise `StoreUnavailableError` when the store cannot be reached or read.
    """

    def __init__(self, url: str) -> None:
        """Opens a store.

        Args:
            url: A folder, made if absent, or `s3://bucket/prefix`, `gs://…`, `az://…`; credentials and endpoint come
                from the provider's usual environment variables.

        Raises:
            InvalidInputError: the URL has another scheme, or the folder cannot be made.
        """
        self.storage_options: dict[str, str]
        """The same limits as text, for libraries that open a table below `url` themselves."""
        if not url:
            raise InvalidInputError("store: give a folder or one of s3://, gs://, az://")
        scheme, separator, _ = url.partition("://")
        if separator and scheme != "file":
            if scheme not in _REMOTE_SCHEMES:
                raise InvalidInputError(f"store {url!r}: use a folder or one of s3://, gs://, az://")
            self.url = url.rstrip("/")
            self._is_folder = False
            try:
                # Given client options, obstore no longer reads this one from the environment.
                allow_http = _is_true(os.environ.get(f"{_REMOTE_SCHEMES[scheme]}_ALLOW_HTTP", ""))
                self._objects: ObjectStore = from_url(
                    self.url,
                    client_options={
                        "connect_timeout": _CONNECT_TIMEOUT,
                        "timeout": _TIMEOUT,
                        "allow_http": allow_http,
                    },
                    retry_config={"max_retries": _MAX_RETRIES},
                )
            except (BaseError, ValueError) as error:  # Nothing was contacted yet: the URL or the environment is wrong.
                raise InvalidInputError(f"store {url!r}: {_first_line(error)}") from error
            self.storage_options = {
                "connect_timeout": _CONNECT_TIMEOUT,
                "timeout": _TIMEOUT,
                "allow_http": str(allow_http).lower(),
                "max_retries": str(_MAX_RETRIES),
            }
            return
        self.storage_options = {}
        self._is_folder = True
        folder = Path(url.removeprefix("file://")).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(f"store {url!r}: {error}") from error
        self.url = os.fspath(folder)
        self._objects = LocalStore(folder)

    def put_new(self, path: str, content: bytes | memoryview) -> None:
        """Writes an object, atomically, unless it exists.

        Raises:
            ConflictError: the object exists; it is unchanged.
        """
        with _translated(path):
            try:
                obstore.put(self._objects, path, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, ObjectPreconditionError, FileExistsError) as error:
                raise ConflictError(f"{path} exists already") from error
            except (FileNotFoundError, ObjectNotFoundError) as error:
                raise StoreUnavailableError(f"{path}: the bucket does not exist: {_first_line(error)}") from error

    def put_durable(self, path: str, content: bytes) -> None:
        """Writes an object as `put_new` does, and returns when it would outlive a loss of power.

        Raises:
            ConflictError: the object exists; it is unchanged.
        """
        self.put_new(path, content)
        if self._is_folder:  # The other stores promise it for every object; a folder keeps it in memory for a while.
            with _translated(path):
                file = Path(self.url, path)
                for part in (file, file.parent):
                    descriptor = os.open(part, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)

    def get(self, path: str) -> bytes:
        """Reads an object.

        Raises:
            NotFoundError: there is no such object.
        """
        with _translated(path):
            return obstore.get(self._objects, path).bytes().to_bytes()

    def get_range(self, path: str, start: int, length: int) -> memoryview:
        """Reads a part of an object; less than asked for where the object ends before, which its reader must notice.

        Raises:
            NotFoundError: there is no such object.
        """
        with _translated(path):
            return memoryview(obstore.get_range(self._objects, path, start=start, length=length))

    def files(self, prefix: str) -> dict[str, int]:
        """Paths of all objects below a prefix, with their sizes in bytes."""
        with _translated(prefix):
            return {meta["path"]: meta["size"] for page in obstore.list(self._objects, prefix) for meta in page}

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a prefix."""
        with _translated(prefix):
            found = obstore.list_with_delimiter(self._objects, prefix)["common_prefixes"]
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def delete(self, path: str) -> None:
        """Deletes an object, if it exists."""
        with _translated(path):
            try:
                obstore.delete(self._objects, path)
            except (FileNotFoundError, ObjectNotFoundError):
                return


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ObjectNotFoundError) as error:
        raise NotFoundError(f"{what} is not in the store") from error
    except (BaseError, OSError) as error:
        raise StoreUnavailableError(f"{what}: {_first_line(error)}") from error
