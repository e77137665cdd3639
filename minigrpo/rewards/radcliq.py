"""RadCliQ: how many errors a radiologist would find, predicted from four scores of a pair of
reports. Lower is better.
"""

# The published regression, in the order radgraph, bertscore, s_emb, bleu: (x - mean) / scale, times
# coef. That of bleu is nil.
MEAN = (0.5379231241355762, 0.6175725628125001, 0.7647942121140658, 0.44738335396242174)
SCALE = (0.3028258411486429, 0.22430938459304575, 0.2539439110169773, 0.2989271671041838)
COEF = (-0.37708368261038905, -0.3703000997448032, -0.25261621789593225, 4.315e-12)
INTERCEPT = 2.47e-10


def radcliq_v1(radgraph: float, bertscore: float, s_emb: float, bleu: float = 0.0) -> float:
    """RadCliQ-v1 (Yu et al. 2023, Patterns 4:100802): 2.450143 - 1.245216 radgraph - 1.650845
    bertscore - 0.994772 s_emb.

    radgraph: `radgraph_f1`'s "radcliq"; bertscore: `BertScore`'s default; s_emb: cosine of
        CheXbert's vectors. (1, 1, 1)
    gives -1.440690, which equal reports reach if they hold a relation; (0, 0, 0) gives 2.450143.
    """
    parts = zip((radgraph, bertscore, s_emb, bleu), MEAN, SCALE, COEF)
    return sum(coef * (x - mean) / scale for x, mean, scale, coef in parts) + INTERCEPT
