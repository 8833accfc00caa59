import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.access import Keys
from services.core.errors import ForbiddenError, SettingsError, UnauthorizedError
from services.core.settings import Settings

PRODUCER, OPERATOR = "p" * 16, "o" * 16
KEYS = Keys.parse(f"produce:{PRODUCER},produce+recommend+operate:{OPERATOR}")


def test_a_key_opens_its_roles_and_no_other() -> None:
    KEYS.check(f"Bearer {PRODUCER}", "produce")
    KEYS.check(f"bearer {OPERATOR}", "operate")
    with pytest.raises(ForbiddenError, match="'operate'"):
        KEYS.check(f"Bearer {PRODUCER}", "operate")
    assert KEYS.header("recommend") == {"authorization": f"Bearer {OPERATOR}"}


@given(st.none() | st.text() | st.sampled_from([PRODUCER, f"Basic {PRODUCER}", "Bearer "]))
def test_anything_else_opens_nothing(authorization: str | None) -> None:
    with pytest.raises(UnauthorizedError):
        KEYS.check(authorization, "produce")


def test_without_keys_everyone_is_let_in() -> None:
    Keys.parse("").check(None, "operate")
    assert Keys.parse("").header("operate") == {}


@pytest.mark.parametrize(
    "text", ["admin:" + OPERATOR, OPERATOR, "produce:short", "produce+:" + OPERATOR]
)
def test_a_bad_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(SettingsError, match="REFLUX_API_KEYS, key 1") as caught:
        Settings.load(api_keys=text)
    assert OPERATOR not in str(caught.value)
    assert "short" not in str(caught.value)


def test_nobody_listens_off_loopback_without_keys_unless_told_so() -> None:
    with pytest.raises(SettingsError, match="REFLUX_API_KEYS"):
        Settings.load(host="0.0.0.0")
    Settings.load(host="0.0.0.0", api_keys="operate:" + OPERATOR)
    Settings.load(host="0.0.0.0", allow_open=True)
