import pytest
import torch

from fxq.metrics import sprites
from fxq.models.prompts import PromptError


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(5)
    conditions = sprites.sample_conditions(96, generator, unseen=False)
    return sprites.render(conditions, generator), conditions


def test_rendered_clips_score_at_least_99_percent(clips):
    videos, conditions = clips
    assert videos.shape == (96, sprites.FRAMES, 3, sprites.SIZE, sprites.SIZE)
    assert videos.min() >= -1
    assert videos.max() <= 1
    means = sprites.score(videos, conditions).means()
    assert set(means) == {"shape", "colour", "motion", "exact_steps"}
    assert min(means.values()) >= 0.99, means


def test_prompts_of_other_videos_score_near_chance(clips):
    videos, conditions = clips
    means = sprites.score(videos, conditions.roll(1, 0)).means()
    assert means["shape"] < 1 / 6 + 0.15
    assert means["colour"] < 1 / 6 + 0.15
    assert means["motion"] < 1 / 8 + 0.15
    assert means["exact_steps"] < 1 / 8 + 0.15


def test_scores_stand_noise(clips):
    videos, conditions = clips
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(1))
    means = sprites.score(videos + 0.3 * noise, conditions).means()
    assert min(means.values()) >= 0.97, means


def test_noise_alone_scores_near_chance(clips):
    videos, conditions = clips
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(2))
    means = sprites.score(noise, conditions).means()
    assert max(means.values()) < 0.4, means
    assert means["motion"] < 0.05


def test_a_video_that_stands_still_has_no_motion(clips):
    videos, conditions = clips
    means = sprites.score(videos[:, :1].expand_as(videos), conditions).means()
    assert means["shape"] >= 0.99
    assert means["motion"] == 0
    assert means["exact_steps"] == 0


def test_the_held_out_prompts_are_disjoint_from_the_seen_ones():
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(row) for row in sprites.sample_conditions(2000, generator, unseen=False).tolist()}
    unseen = {tuple(row) for row in sprites.sample_conditions(500, generator, unseen=True).tolist()}
    assert not seen & unseen
    assert sprites.held_out(torch.tensor(sorted(unseen))).all()
    assert not sprites.held_out(torch.tensor(sorted(seen))).any()


def test_one_eighth_of_all_prompts_is_held_out():
    every = torch.cartesian_prod(*(torch.arange(n) for n in sprites.COUNTS))
    assert sprites.held_out(every[::7]).float().mean().item() == pytest.approx(1 / 8, abs=0.02)


def test_prompt_vectors_name_each_word_once():
    conditions = sprites.sample_conditions(20, torch.Generator().manual_seed(0), unseen=False)
    embeds = sprites.prompt_embeds(conditions)
    assert embeds.shape == (20, len(sprites.FIELDS), sprites.TEXT_DIM)
    assert sprites.VOCABULARY <= sprites.TEXT_DIM
    assert torch.equal(embeds.count_nonzero(dim=2), torch.ones(20, 7, dtype=torch.int64))
    words = embeds.argmax(2)
    assert len({tuple(row) for row in words.tolist()}) == len({tuple(row) for row in conditions.tolist()})


def test_a_prompt_reads_as_words():
    assert sprites.describe(torch.tensor([0, 1, 2, 1, 0, 3, 4])) == "ring green left fast black row3 column4"


def test_rendering_is_a_function_of_the_generator():
    conditions = torch.tensor([[0, 0, 0, 0, 0, 0, 0]])
    first, again = (sprites.render(conditions, torch.Generator().manual_seed(4), frames=3) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, 1], first[:, 0].roll(2, -1))


def test_words_in_any_order_are_the_prompt():
    found = sprites.parse("column2 ring row1 red right black slow")
    assert found.shape == (1, 7) and sprites.describe(found[0]) == "ring red right slow black row1 column2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rign red right slow black row1 column2", "needs exactly one shape of: .*; for 'rign' did you mean 'ring'"),
        ("ring red blue right slow black row1 column2", "needs exactly one colour of"),
        ("", "needs exactly one"),
    ],
)
def test_a_field_with_no_word_or_two_is_refused(text, message):
    with pytest.raises(PromptError, match=message):
        sprites.parse(text)
