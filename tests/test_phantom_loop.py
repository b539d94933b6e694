"""The one-page example runs, says both denoisers' numbers, and draws what each term asks."""

from examples import phantom_loop


def test_the_page_runs_and_draws_its_figure(tmp_path, capsys) -> None:
    figure = tmp_path / "maps.png"
    phantom_loop.main(["--steps", "2", "--figure", str(figure)])
    printed = capsys.readouterr().out
    rows = {line[:18].strip(): line[18:].split() for line in printed.splitlines()[1:5]}
    assert set(rows) == {"low dose", "normal dose", "adv + mse", "adv + mse + task"}
    assert float(rows["normal dose"][0]) == 0 and float(rows["low dose"][0]) > 0.05
    assert rows["adv + mse"] != rows["adv + mse + task"], "the task term changes the training"
    assert "gradient energy inside the liver: adv" in printed and figure.read_bytes().startswith(b"\x89PNG")
