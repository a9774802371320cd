from fxq.runtime.differences import differences

FACTS = {"recipe": {"bits": "8", "name": "r"}, "model": {"a": "1"}}


def told(**changes):
    return {subject: {**FACTS.get(subject, {}), **changes.get(subject, {})} for subject in {**FACTS, **changes}}


def test_ranks_that_agree_have_no_differences():
    assert differences([FACTS, told(), told()]) == [] == differences([FACTS])


def test_a_difference_names_the_rank_the_subject_and_both_values():
    assert differences([FACTS, FACTS, told(recipe={"bits": "4"})]) == [
        "rank 2 has another recipe than rank 0: bits is 4, on rank 0 8"
    ]


def test_of_several_names_the_first_is_told_and_the_others_counted():
    (found,) = differences([FACTS, told(recipe={"bits": "4", "name": "s", "more": "1"})])
    assert found.endswith("bits is 4, on rank 0 8 (and 2 more)")


def test_what_one_rank_alone_has_is_a_difference():
    assert differences([FACTS, {"recipe": FACTS["recipe"]}]) == [
        "rank 1 has another model than rank 0: a is absent, on rank 0 1"
    ]
    assert differences([FACTS, told(data={"rows": "7"})]) == [
        "rank 1 has another data than rank 0: rows is 7, on rank 0 absent"
    ]


def test_no_more_are_told_than_asked_for():
    ranks = [FACTS, *(told(model={"a": str(i)}) for i in range(2, 9))]
    assert len(differences(ranks)) == 3 and len(differences(ranks, limit=5)) == 5
