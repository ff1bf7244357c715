//! The estimator and the pipeline on made-up layers.

use std::path::Path;
use std::sync::Arc;

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::model::*;
use flashlm_formats::predictors::{LayerReport, RankCurve};
use flashlm_formats::recording::{Recording, RecordingInfo};
use flashlm_kernels::{View, product};
use half::f16;
use linfa::ParamGuard;
use linfa::dataset::DatasetBase;
use linfa::traits::{Fit, PredictInplace};

use super::random::Random;
use super::*;

const HIDDEN: usize = 24;
const FFN: usize = 600; // more than one piece of work

/// A layer whose pre-activations have rank 6, with a bias that keeps most neurons quiet.
struct Layer {
    directions: Vec<f32>,
    weights: Vec<f32>,
}

impl Layer {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut numbers = |n: usize| (0..n).map(|_| random.signed()).collect();
        Layer { directions: numbers(6 * HIDDEN), weights: numbers(FFN * 6) }
    }

    /// Inputs `[tokens, HIDDEN]` and activations `[tokens, FFN]`.
    fn run(&self, tokens: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
        let mut random = Random::new(seed);
        let inputs: Vec<f32> = (0..tokens * HIDDEN).map(|_| f16::from_f32(random.signed()).to_f32()).collect();
        let mut activations = Vec::with_capacity(tokens * FFN);
        for x in inputs.chunks_exact(HIDDEN) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let h: Vec<f32> = self.directions.chunks_exact(HIDDEN).map(|d| dot(d, x)).collect();
            activations.extend(self.weights.chunks_exact(6).map(|w| (dot(w, &h) - 2.5).max(0.0)));
        }
        (inputs, activations)
    }
}

/// Recorded tokens of that layer, whose input `i` is this many times as large.
pub(super) fn dataset(tokens: usize, size: impl Fn(usize) -> f32) -> TrainingSet {
    let (inputs, activations) = Layer::new(1).run(tokens, 2);
    let mut activity = Activity::empty(FFN);
    for (token, row) in activations.chunks_exact(FFN).enumerate() {
        activity.push((0u32..).zip(row.iter().copied()).filter(|(_, a)| *a > 0.0), token / 20 % 10 == 3);
    }
    let sized = inputs.iter().enumerate().map(|(at, &v)| f16::from_f32(v * size(at % HIDDEN)));
    DatasetBase::new(Inputs::new(sized.collect(), HIDDEN), activity)
}

/// The weights of that layer.
pub(super) fn projection() -> Arc<Projection> {
    let layer = Layer::new(1);
    let mut rows = vec![0.0; FFN * HIDDEN];
    let (w, d) = (View::rows(&layer.weights, FFN, 6, 6), View::rows(&layer.directions, 6, HIDDEN, HIDDEN));
    product(&mut rows, HIDDEN, false, w, d);
    Arc::new(Projection::new(&rows, vec![-2.5; FFN]))
}

fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn a_low_rank_layer_is_learned() {
    let set = dataset(4000, |_| 1.0);
    // The inputs have no principal components to start from, so it takes more steps than on a real layer.
    let params = LowRankPredictor::params(8).epochs(60).patience(10).batch(32);
    let fitted = params.check().unwrap().fit(&set).unwrap();
    let other = {
        let (inputs, activations) = Layer::new(1).run(500, 3);
        let inputs = Inputs::new(inputs.iter().map(|&v| f16::from_f32(v)).collect(), HIDDEN);
        let mut predicted = fitted.default_target(&inputs);
        fitted.predict_inplace(&inputs, &mut predicted);
        (predicted, activations)
    };
    let (mut hits, mut missed, mut alarms) = (0, 0, 0);
    for (&predicted, &activation) in other.0.iter().zip(&other.1) {
        match (predicted, activation > 0.0) {
            (true, true) => hits += 1,
            (false, true) => missed += 1,
            (true, false) => alarms += 1,
            _ => (),
        }
    }
    let share = (hits + missed) as f64 / other.1.len() as f64;
    assert!((0.01..0.2).contains(&share), "{share}");
    assert!(missed * 8 < hits && alarms * 3 < hits, "{hits} hits, {missed} missed, {alarms} false alarms");
}

/// What is held out decides what is kept, and nothing else: where that is the same epoch, it has no influence at all.
#[test]
fn held_out_tokens_teach_nothing() {
    let with = |size: f32| {
        let (inputs, activations) = Layer::new(1).run(600, 2);
        let mut activity = Activity::empty(FFN);
        let mut values: Vec<f16> = inputs.iter().map(|&v| f16::from_f32(v)).collect();
        for (token, row) in activations.chunks_exact(FFN).enumerate() {
            let is_held_out = token / 20 % 10 == 3;
            if is_held_out {
                let inputs = &mut values[token * HIDDEN..][..HIDDEN];
                inputs.iter_mut().for_each(|value| *value = f16::from_f32(value.to_f32() * size));
            }
            activity.push((0u32..).zip(row.iter().copied()).filter(|(_, a)| *a > 0.0), is_held_out);
        }
        let set = DatasetBase::new(Inputs::new(values, HIDDEN), activity);
        let params = LowRankPredictor::params(4).epochs(1).batch(32).check().unwrap();
        params.fit_from(&params.starts(&set).unwrap(), &set).unwrap()
    };
    let (one, other) = (with(1.0), with(0.9));
    assert_eq!((one.1.kept, other.1.kept), (Some(0), Some(0)));
    assert!(one.0 == other.0 && one.1.epochs != other.1.epochs);
}

#[test]
fn threads_change_no_bit() {
    let set = dataset(1500, |_| 1.0);
    let fit = || LowRankPredictor::params(8).epochs(2).check().unwrap().fit(&set).unwrap();
    let one = on_threads(1, fit);
    assert!(one == on_threads(3, fit));
    let other = LowRankPredictor::params(8).epochs(2).seed(1).check().unwrap().fit(&set).unwrap();
    assert!(one != other);
}

#[test]
fn the_start_spans_the_principal_components() {
    // Of inputs that vary along the first five axes alone, but for a little noise, those axes are the components.
    let tokens = 400;
    let mut random = Random::new(5);
    let values: Vec<f32> = (0..tokens * HIDDEN)
        .map(|i| f16::from_f32(random.signed() * if i % HIDDEN < 5 { 8.0 } else { 0.1 }).to_f32())
        .collect();
    let mut activity = Activity::empty(FFN);
    (0..tokens).for_each(|t| activity.push([(t as u32 % 7, 1.0)].into_iter(), false));
    let set = DatasetBase::new(Inputs::new(values.iter().map(|&v| f16::from_f32(v)).collect(), HIDDEN), activity);
    let all: Vec<u32> = (0..tokens as u32).collect();
    let starts = start::StartParams { tokens: all.clone(), projection: None }.fit(&set).unwrap();
    let start = starts.best(&set, 5, &all).predictor;
    // Each direction must lie in their span.
    for j in 0..5 {
        let ours: Vec<f64> = (0..HIDDEN).map(|i| start.encoder[[j, i]] as f64).collect();
        let length: f64 = ours.iter().map(|v| v * v).sum();
        let within: f64 = ours[..5].iter().map(|v| v * v).sum();
        assert!(within > 0.999 * length, "direction {j}: {within} of {length}");
    }
}

/// The made-up layer has rank 6, and inputs without principal components: its weights tell the directions, whole at rank 6.
#[test]
fn the_weights_tell_the_directions() {
    let projection = projection();
    let set = dataset(2000, |_| 1.0);
    let false_positives = |projection: Option<Arc<Projection>>, rank| {
        let params = LowRankPredictor::params(rank).projection(projection).check().unwrap();
        let tokens = set.targets().part(true);
        let start = params.starts(&set).unwrap().best(&set, rank, &tokens).predictor;
        Curve::measure(&start, &set, &tokens).at_misses(0.03).false_positive_rate
    };
    let (without, with) = (false_positives(None, 6), false_positives(Some(projection.clone()), 6));
    assert!(with < 0.002 && without > 20.0 * with, "{with} with the weights, {without} without");
    let (without, with) = (false_positives(None, 3), false_positives(Some(projection.clone()), 3));
    assert!(with < 0.8 * without, "{with} with the weights, {without} without");

    let narrow = Arc::new(Projection::new(&vec![1.0; FFN * (HIDDEN - 1)], vec![0.0; FFN]));
    let params = LowRankPredictor::params(3).projection(narrow).check().unwrap();
    assert!(matches!(
        params.fit(&set),
        Err(TrainError::Projection { rows: FFN, columns: 23, hidden: HIDDEN, ffn: FFN })
    ));
}

/// At the lowest threshold all neurons with a row are predicted, and no other.
#[test]
fn neurons_without_a_row_are_never_predicted() {
    let set = dataset(600, |_| 1.0);
    let low = LowRankPredictor::params(4).epochs(1).check().unwrap().fit(&set).unwrap();
    let even: Vec<u32> = (0..FFN as u32).step_by(2).collect();
    let fitted = Fitted::low_rank(low, PredictorDType::F16).with_rows(&even);
    let held_out = set.targets().part(true);
    let point = Curve::measure(&fitted, &set, &held_out).at_over_fetch(1e9);
    let active: Vec<u32> = held_out.iter().flat_map(|&t| set.targets().of(t as usize).0.iter().copied()).collect();
    let odd = active.iter().filter(|n| *n % 2 == 1).count();
    assert_eq!((point.predicted_fraction, point.false_negative_rate), (0.5, odd as f64 / active.len() as f64));
}

/// Weights that did not make the recorded activity are told from those that did.
#[test]
fn other_weights_do_not_agree() {
    let layer = Layer::new(1);
    let rows_of = |layer: &Layer| {
        let mut rows = vec![0.0; FFN * HIDDEN];
        let (w, d) = (View::rows(&layer.weights, FFN, 6, 6), View::rows(&layer.directions, 6, HIDDEN, HIDDEN));
        product(&mut rows, HIDDEN, false, w, d);
        rows
    };
    let set = dataset(600, |_| 1.0);
    let agreement = |rows: &[f32]| Projection::new(rows, vec![-2.5; FFN]).agreement(&set).unwrap();
    assert_eq!(agreement(&rows_of(&layer)), 1.0);
    assert!(agreement(&rows_of(&Layer::new(2))) < 0.5);
    assert_eq!(Projection::new(&vec![0.0; FFN * (HIDDEN + 1)], vec![0.0; FFN]).agreement(&set), None);
}

/// Fewer tokens than directions: what the inputs do not say must not stop the start from the weights.
#[test]
fn few_tokens_are_enough_for_a_start() {
    let mut random = Random::new(11);
    let rows: Vec<f32> = (0..FFN * HIDDEN).map(|_| random.signed()).collect();
    let tokens = 44;
    // One input far larger than all others, and copies of each other.
    let mut values = Vec::new();
    for _ in 0..tokens {
        let one = random.signed();
        values.extend((0..HIDDEN).map(|i| f16::from_f32(if i == 3 { 3000.0 * one } else { one * (i % 2) as f32 })));
    }
    let mut activity = Activity::empty(FFN);
    (0..tokens).for_each(|t| activity.push([(t as u32 % 7, 1.0)].into_iter(), t % 5 == 0));
    let set = DatasetBase::new(Inputs::new(values, HIDDEN), activity);
    let projection = Arc::new(Projection::new(&rows, vec![0.0; FFN]));
    let params = LowRankPredictor::params(4).projection(projection).check().unwrap();
    assert!(params.fit(&set).unwrap().is_finite());
    let starts = params.starts(&set).unwrap();
    assert!(starts.quantised(&set).unwrap().is_some());
}

/// What is always the same needs no directions: biases say which neurons fire.
#[test]
fn inputs_that_never_change_need_biases_alone() {
    let tokens = 100;
    let mut activity = Activity::empty(FFN);
    (0..tokens).for_each(|t| activity.push((0..FFN as u32).step_by(5).map(|n| (n, 1.0)), t % 5 == 0));
    let set = DatasetBase::new(Inputs::new(vec![f16::from_f32(0.3); tokens * HIDDEN], HIDDEN), activity);
    for projection in [None, Some(projection())] {
        let params = LowRankPredictor::params(4).projection(projection).check().unwrap();
        let fitted = params.fit(&set).unwrap();
        let mut predicted = fitted.default_target(set.records());
        fitted.predict_inplace(set.records(), &mut predicted);
        assert!(predicted.indexed_iter().all(|((_, n), is)| *is == (n % 5 == 0)));
    }
}

#[test]
fn what_the_stored_type_cannot_hold_is_refused_and_the_layer_named() {
    let set = dataset(600, |i| if i == 0 { 1e-6 } else { 1.0 });
    let mut low = LowRankPredictor::params(4).epochs(1).check().unwrap().fit(&set).unwrap();
    low.encoder[[1, 0]] = 1e6;
    assert!(Fitted::low_rank(low.clone(), PredictorDType::Int8).as_stored().is_ok());
    let error = Fitted::low_rank(low, PredictorDType::F16).as_stored().map_err(TrainError::in_layer(7)).unwrap_err();
    assert!(error.to_string().contains("layer 7: its predictor's numbers exceed the range of f16"), "{error}");
    // As directions are looked for in all layers alike, the one whose inputs have none is named too.
    let mut values = vec![f16::ONE; 100 * HIDDEN];
    values[5] = f16::INFINITY;
    let mut activity = Activity::empty(FFN);
    (0..100).for_each(|t| activity.push([(t as u32 % 7, 1.0)].into_iter(), t % 5 == 1));
    let infinite = DatasetBase::new(Inputs::new(values, HIDDEN), activity);
    let error = LowRankPredictor::params(4).check().unwrap().fit(&infinite).unwrap_err();
    assert!(error.to_string().contains("infinite or no numbers"), "{error}");
}

/// Four bits of a projection say far more of a layer of full rank than as many bytes of thin matrices.
#[test]
fn a_quantised_projection_is_a_predictor() {
    let mut random = Random::new(9);
    let rows: Vec<f32> = (0..FFN * HIDDEN).map(|_| random.signed()).collect();
    let tokens = 2000;
    let values: Vec<f32> =
        (0..tokens * HIDDEN).map(|i| f16::from_f32(random.signed() + (i % 3) as f32).to_f32()).collect();
    let mut products = vec![0.0; tokens * FFN];
    let (x, w) = (View::rows(&values, tokens, HIDDEN, HIDDEN), View::rows(&rows, FFN, HIDDEN, HIDDEN));
    product(&mut products, FFN, false, x, w.t());
    let mut activity = Activity::empty(FFN);
    for (token, row) in products.chunks_exact(FFN).enumerate() {
        activity.push((0u32..).zip(row.iter().map(|z| z - 6.0)).filter(|(_, a)| *a > 0.0), token / 20 % 10 == 3);
    }
    let set = DatasetBase::new(Inputs::new(values.iter().map(|&v| f16::from_f32(v)).collect(), HIDDEN), activity);
    let projection = Projection::new(&rows, vec![-6.0; FFN]);
    let (train, held_out) = (set.targets().part(false), set.targets().part(true));
    let quantised = QuantisedProjection::new(&projection, &moments::moments(&set, &train), &set, &train).unwrap();
    let false_positives =
        |scores: &dyn NeuronScores| Curve::measure(scores, &set, &held_out).at_misses(0.03).false_positive_rate;
    let of = RowsOf { hidden: HIDDEN, neurons: FFN, rows: FFN };
    let bytes = predictor_bytes(HIDDEN, of, PredictorDType::Int4);
    let rank = 14;
    assert!(predictor_bytes(rank, of, PredictorDType::Int8) <= bytes + 8 * FFN as u64);
    let params = LowRankPredictor::params(rank).projection(Arc::new(projection)).check().unwrap();
    let low = params.fit(&set).unwrap().rounded(PredictorDType::Int8);
    let (quantised_rate, low) = (false_positives(&quantised), false_positives(&low));
    assert!(quantised_rate < 0.02 && low > 2.0 * quantised_rate, "{quantised_rate}, of low rank {low}");

    // linfa's way to ask says the same.
    let mut predicted = quantised.default_target(set.records());
    quantised.predict_inplace(set.records(), &mut predicted);
    let mut scored = Vec::new();
    let all: Vec<u32> = (0..tokens as u32).collect();
    quantised.scores(set.records(), &all, &mut |_, scores| scored.extend(scores.iter().map(|z| *z > 0.0)));
    assert_eq!(predicted.into_raw_vec_and_offset().0, scored);
}

#[test]
fn hopeless_fits_are_refused() {
    let set = dataset(60, |_| 1.0);
    let fit = |rank| LowRankPredictor::params(rank).check().unwrap().fit(&set);
    assert!(matches!(fit(HIDDEN + 1), Err(TrainError::Rank { rank: 25, hidden: HIDDEN, ffn: FFN })));
    let few = LowRankPredictor::params(2).check().unwrap().fit(&dataset(30, |_| 1.0));
    assert!(matches!(few, Err(TrainError::TooFewTokens { .. })), "{few:?}");
    let mut activity = Activity::empty(FFN);
    activity.push(std::iter::empty(), false);
    let uneven = DatasetBase::new(set.records().clone(), activity);
    let result = LowRankPredictor::params(2).check().unwrap().fit(&uneven);
    assert!(matches!(result, Err(TrainError::Lengths { inputs: 60, activity: 1 })), "{result:?}");
}

fn recording(dir: &Path) -> Recording {
    let tokens = 1500;
    let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: Block::PreNorm,
        attention: Attention { heads: 2, kv_heads: 2, head_dim: 12, qkv_bias: true, out_bias: true, qk_norm: None },
        positions: Positions::None,
        feed_forward: FeedForward::Dense(Ffn {
            size: FFN,
            activation: Activation::Relu,
            gated: false,
            up_activated: false,
            gate_bias: false,
            up_bias: true,
            down_bias: true,
        }),
    };
    let spec = ModelSpec {
        family: "opt".into(),
        vocab_size: 50,
        hidden_size: HIDDEN,
        embed_size: HIDDEN,
        max_positions: 100,
        learned_positions: Some(LearnedPositions { offset: 2 }),
        layers: vec![layer; 3],
        final_norm: Some(norm),
        tied_head: true,
        head_bias: false,
        bos: Some(2),
        eos: vec![2],
        thresholds: vec![],
    };
    let info = RecordingInfo::new(spec, "made-up".into());
    let sequences = (0..=15).map(|s| s * 100).collect();
    let documents = (0..tokens as u32).map(|t| t / 30).collect();
    let recording =
        Recording::create(dir, info, vec![2; tokens], sequences, documents, vec![3, 17, 30, 41, 44]).unwrap();
    for layer in 0..3 {
        let (inputs, activations) = Layer::new(layer).run(tokens, 9);
        let mut writer = recording.layer_writer(layer as usize).unwrap();
        writer.write(&inputs, &activations, None).unwrap();
        writer.finish(&[1.0; FFN]).unwrap();
    }
    recording
}

struct Silent;
impl Progress for Silent {
    fn tried(&self, _: usize, _: &RankCurve) {}
    fn trained(&self, _: &LayerReport) {}
}

#[test]
fn layers_train_alone_as_together() {
    let dir = tempfile::tempdir().unwrap();
    let recording = recording(&dir.path().join("recording"));
    let mut options = TrainOptions::new(3);
    options.fit = options.fit.epochs(2);
    options.look_ahead = Some(4);
    options.size_budget = 0.6;
    let all = train_recording(TrainingData::new(&recording), &options, &dir.path().join("all"), &Silent).unwrap();
    assert_eq!(all.layers.len(), 3);
    assert!(all.predictor_bytes as f64 <= 0.6 * all.ffn_bytes as f64);
    options.layers = 1..2;
    let one = on_threads(1, || {
        train_recording(TrainingData::new(&recording), &options, &dir.path().join("one"), &Silent).unwrap()
    });
    let without_time = |mut report: LayerReport| {
        report.seconds = 0.0;
        report
    };
    assert_eq!(without_time(one.layers[0].clone()), without_time(all.layers[1].clone()));
    let file = |name: &str| std::fs::read(dir.path().join(name).join("predictor-001.safetensors")).unwrap();
    assert!(file("one") == file("all"));

    // What the file holds decides as the report says.
    let bytes = file("all");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    let own = ["bias", "decoder", "decoder_scale", "encoder", "encoder_scale"];
    assert_eq!(names[..5], own);
    assert_eq!(names[5..10], own.map(|name| format!("lookahead.{name}")));
    // Some neurons of a made-up layer never fire.
    let rows = all.layers[1].rows.unwrap();
    assert_eq!((&names[10..], rows < FFN), (&["rows"][..], true));
    assert_eq!(tensors.tensor("decoder").unwrap().shape(), [rows, all.layers[1].rank]);
    assert_eq!(tensors.tensor("encoder").unwrap().shape(), [all.layers[1].rank, HIDDEN]);
    let stored: usize = own.iter().chain(&["rows"]).map(|name| tensors.tensor(name).unwrap().data().len()).sum();
    assert_eq!(stored as u64, all.layers[1].bytes);

    options.layers = 2..4;
    let beyond = train_recording(TrainingData::new(&recording), &options, dir.path(), &Silent);
    assert!(matches!(beyond, Err(TrainError::Layers { end: 4, layers: 3, .. })), "{beyond:?}");
}
