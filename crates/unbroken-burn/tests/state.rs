//! Burn's objects through a run and back, in one process: a life that is cut short is a `Training` dropped in the middle.
//!
//! Touches: temporary directories; Burn's generator, which the whole process shares, so these tests take turns.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use burn::lr_scheduler::LrSchedulerConfig;
use burn::lr_scheduler::composed::ComposedLrSchedulerConfig;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::exponential::ExponentialLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLrScheduler, ModuleLrSchedulerConfig};
use burn::lr_scheduler::noam::NoamLrSchedulerConfig;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::module::{Module, Param, ParamGroup};
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig, LinearLayout};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdaGradConfig, AdafactorConfig, AdamConfig, AdamWConfig, AdanConfig, GradientsParams, LBFGS, LBFGSConfig,
    LambConfig, LionConfig, ModuleOptimizer, MuonConfig, RmsPropConfig, SgdConfig,
};
use burn::tensor::{Device, Distribution, Tensor};
use burn::train::metric::LossMetric;
use burn::train::metric::store::{Aggregate, Direction, Split};
use burn::train::{
    InferenceStep, Learner, MetricEarlyStoppingStrategy, RegressionOutput, StoppingCondition,
    SupervisedTraining, TrainOutput, TrainStep,
};
use unbroken::journal::Boundary;
use unbroken::run::{read_checkpoint, read_journal};
use unbroken::train::{
    Failure, Level, Loader, Options, Policy, Sample, Source, StateReader, StateWriter, Stateful, Training,
};
use unbroken::{Error, Result};
use unbroken_burn::learner::Exact;
use unbroken_burn::{DeviceGenerator, ExactLoader, Trained, module, optimizer};

/// Burn has one generator for the whole process: tests that run side by side would draw from each other's.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

struct Numbers;

impl Source for Numbers {
    type Item = [f32; 4];

    fn len(&self) -> u64 {
        24
    }

    fn at(&self, sample: &Sample) -> std::result::Result<[f32; 4], Failure> {
        let mut draws = sample.draws();
        Ok(std::array::from_fn(|place| {
            sample.index as f32 / 24.0 + place as f32 * 0.1 + draws.uniform() as f32
        }))
    }
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    norm: BatchNorm,
    dropout: Dropout,
    last: Linear,
}

impl Net {
    fn new(device: &Device) -> Net {
        Net {
            first: LinearConfig::new(4, 8).with_bias(false).init(device),
            norm: BatchNormConfig::new(8).init(device),
            dropout: DropoutConfig::new(0.4).init(),
            last: LinearConfig::new(8, 2).init(device),
        }
    }

    fn loss(&self, batch: &[[f32; 4]], device: &Device) -> Tensor<1> {
        let input = Tensor::<1>::from_floats(batch.as_flattened(), device).reshape([batch.len(), 4]);
        let hidden = self.dropout.forward(self.norm.forward(self.first.forward(input)));
        self.last.forward(hidden).powi_scalar(2).mean()
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn options(path: &Path) -> Options {
    plain_options(path).generator("device", DeviceGenerator::new(&device()))
}

fn plain_options(path: &Path) -> Options {
    let policy = Policy::every_steps(4).not_at_epoch_ends();
    Training::at(path)
        .seed(5)
        .epochs(2)
        .policy(policy)
        .journal(Level::Full)
        .leave_signals_alone()
}

/// What a program trains, and how it takes a step.
trait Program: Stateful {
    fn train(&mut self, batch: &[[f32; 4]]) -> f32;
}

impl Program for Trained<Net> {
    fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
        let loss = self.model.loss(batch, &device());
        let number = loss.clone().into_scalar::<f32>();
        self.step(loss.backward());
        number
    }
}

/// One life: twelve steps in two epochs, or `until` one of them.
fn live(options: Options, mut program: impl Program, until: u64) -> Result<()> {
    let mut loader = Loader::new(Numbers, 4).shuffled().workers(2);
    let mut training = options.start(&mut program)?;
    while training.next_epoch(&mut program)?.is_some() {
        while let Some(mut step) = training.next_step(&mut loader)? {
            let loss = program.train(&step.take());
            step.log("loss", loss.into());
            step.commit(&mut program)?;
            if training.step() == until {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn records(path: &Path) -> Vec<Boundary> {
    let mut boundaries = read_journal(path).unwrap().boundaries;
    boundaries.iter_mut().for_each(|boundary| boundary.lives.clear());
    boundaries
}

/// Asserts that a program cut short after step 6, two past its checkpoint, comes out as one that was left alone.
fn assert_exact<P: Program>(said: &str, make: impl Fn() -> P) {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let (reference, cut) = (home.path().join("reference"), home.path().join("cut"));
    live(options(&reference), make(), u64::MAX).unwrap();
    live(options(&cut), make(), 6).unwrap();
    live(options(&cut), make(), u64::MAX).unwrap_or_else(|error| panic!("{said}: {error}"));
    let (expected, found) = (records(&reference), records(&cut));
    assert_eq!(expected.len(), 14, "{said}");
    assert_eq!(expected, found, "{said}");
}

#[test]
fn every_optimizer_comes_back_as_it_was() {
    let momentum = || Some(MomentumConfig::new());
    type Make = fn() -> ModuleOptimizer;
    let optimizers: Vec<(&str, Make)> = vec![
        ("Adam", || AdamConfig::new().init()),
        ("Adam, amsgrad", || AdamConfig::new().with_amsgrad(true).init()),
        ("AdamW", || AdamWConfig::new().init()),
        ("AdaGrad", || AdaGradConfig::new().init()),
        ("Adafactor", || AdafactorConfig::new().init()),
        ("Adan", || AdanConfig::new().init()),
        ("Lamb", || LambConfig::new().init()),
        ("Lion", || LionConfig::new().init()),
        ("RMSprop", || RmsPropConfig::new().with_centered(true).init()),
        ("SGD", || SgdConfig::new().init()),
    ];
    for (name, make) in optimizers {
        assert_exact(name, || Trained::new(Net::new(&device()), make(), 0.01));
    }
    let with_momentum = || SgdConfig::new().with_momentum(momentum()).init();
    assert_exact("SGD, momentum", || {
        Trained::new(Net::new(&device()), with_momentum(), 0.01)
    });
}

/// More than is read of an optimizer at once: a parameter that no turn reads would begin anew after the resume.
#[test]
fn a_large_optimizer_comes_back_as_it_was() {
    #[derive(Module, Debug)]
    struct Wide {
        layers: Vec<Linear>,
    }
    impl Program for Trained<Wide> {
        fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
            let input = Tensor::<1>::from_floats(batch.as_flattened(), &device()).reshape([batch.len(), 4]);
            let layers = self.model.layers.iter();
            let loss = layers
                .fold(input, |x, layer| layer.forward(x))
                .powi_scalar(2)
                .mean();
            let number = loss.clone().into_scalar::<f32>();
            self.step(loss.backward());
            number
        }
    }
    let widths = [4, 1100, 1000, 1100, 2];
    let wide = || Wide {
        layers: widths
            .windows(2)
            .map(|pair| LinearConfig::new(pair[0], pair[1]).init(&device()))
            .collect(),
    };
    assert_exact("large", || Trained::new(wide(), AdamConfig::new().init(), 0.01));
}

/// The dropout's neighbours: matrices by one optimizer, the rest by another, found again by path.
#[test]
fn an_optimizer_of_its_own_for_some_parameters_comes_back_as_it_was() {
    let make = || {
        let matrices = ParamGroup::from_paths(vec!["first.weight", "last.weight"]);
        let optimizer: ModuleOptimizer = SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
        optimizer.with_group(matrices, AdamConfig::new().build(), None)
    };
    assert_exact("groups", || Trained::new(Net::new(&device()), make(), 0.01));
}

/// Muon is for matrices only.
#[test]
fn muon_comes_back_as_it_was() {
    #[derive(Module, Debug)]
    struct Flat {
        weight: Linear,
    }
    impl Program for Trained<Flat> {
        fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
            let input = Tensor::<1>::from_floats(batch.as_flattened(), &device()).reshape([batch.len(), 4]);
            let loss = self.model.weight.forward(input).powi_scalar(2).mean();
            let number = loss.clone().into_scalar::<f32>();
            self.step(loss.backward());
            number
        }
    }
    let flat = || Flat {
        weight: LinearConfig::new(4, 4).with_bias(false).init(&device()),
    };
    assert_exact("Muon", || Trained::new(flat(), MuonConfig::new().init(), 0.01));
}

#[test]
fn lbfgs_comes_back_as_it_was() {
    struct Second {
        model: Linear,
        optimizer: LBFGS,
    }
    impl Stateful for Second {
        fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
            out.scope("model", |out| module::write(&self.model, out))?;
            out.scope("optimizer", |out| optimizer::write_lbfgs(&self.optimizer, out))
        }
        fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
            self.model = from.scope("model", |from| module::read(self.model.clone(), from))?;
            self.optimizer = from.scope("optimizer", |from| {
                optimizer::read_lbfgs(self.optimizer.clone(), from)
            })?;
            Ok(())
        }
    }
    impl Program for Second {
        fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
            let input = Tensor::<1>::from_floats(batch.as_flattened(), &device()).reshape([batch.len(), 4]);
            let (model, loss) = self.optimizer.step(0.1, self.model.clone(), |model: Linear| {
                let loss = (model.forward(input.clone()) - 1.0).powi_scalar(2).mean();
                let number = loss.clone().into_scalar::<f32>();
                (
                    f64::from(number),
                    GradientsParams::from_grads(loss.backward(), &model),
                )
            });
            self.model = model;
            loss as f32
        }
    }
    let config = LBFGSConfig::new().with_max_iter(3).with_history_size(4);
    assert_exact("L-BFGS", || Second {
        model: LinearConfig::new(4, 2).init(&device()),
        optimizer: config.init(),
    });
}

#[test]
fn every_scheduler_comes_back_as_it_was() {
    let schedulers: Vec<(&str, LrSchedulerConfig)> = vec![
        ("constant", 0.01.into()),
        ("linear", LinearLrSchedulerConfig::new(0.1, 0.01, 9).into()),
        ("cosine", CosineAnnealingLrSchedulerConfig::new(0.1, 9).into()),
        ("exponential", ExponentialLrSchedulerConfig::new(0.1, 0.9).into()),
        (
            "noam",
            NoamLrSchedulerConfig::new(0.5).with_warmup_steps(4).into(),
        ),
        ("step", StepLrSchedulerConfig::new(0.1, 3).into()),
        (
            "sequential",
            SequentialLrSchedulerConfig::new(
                vec![
                    LinearLrSchedulerConfig::new(0.1, 0.3, 5).into(),
                    CosineAnnealingLrSchedulerConfig::new(0.3, 9).into(),
                ],
                vec![5],
            )
            .into(),
        ),
        (
            "composed",
            ComposedLrSchedulerConfig::new()
                .linear(LinearLrSchedulerConfig::new(0.1, 0.5, 5))
                .cosine(CosineAnnealingLrSchedulerConfig::new(0.5, 9))
                .into(),
        ),
    ];
    for (name, config) in schedulers {
        let scheduler =
            || -> ModuleLrScheduler { ModuleLrSchedulerConfig::new(config.clone()).init().unwrap() };
        assert_exact(name, || {
            Trained::new(Net::new(&device()), SgdConfig::new().init(), scheduler())
        });
    }
}

/// A layer whose matrix lies by columns: Burn's records have it the other way round than the layer itself.
#[test]
fn a_layout_by_columns_comes_back_as_it_was() {
    let make = || {
        let mut net = Net::new(&device());
        net.last = LinearConfig::new(8, 2)
            .with_layout(LinearLayout::Col)
            .init(&device());
        Trained::new(net, AdamWConfig::new().init(), 0.01)
    };
    assert_exact("by columns", make);
}

/// Step 6 of windows of 4 steps: half a window's gradients are in the checkpoint of step 4's successor. Windows of 3
/// leave one step's gradients in the checkpoint itself.
#[test]
fn gradients_that_wait_for_an_update_come_back() {
    for window in [3, 4, 5] {
        let make = || Trained::new(Net::new(&device()), AdamWConfig::new().init(), 0.01).accumulating(window);
        assert_exact(&format!("windows of {window}"), make);
    }
}

/// A layer is frozen in the second life's checkpointed past: what is trained is state.
#[test]
fn a_layer_frozen_during_training_stays_frozen() {
    struct Freezing(Trained<Net>, i64);
    impl Stateful for Freezing {
        fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
            out.value("steps", self.1)?;
            self.0.state(out)
        }
        fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
            self.1 = from.int("steps")?;
            self.0.restore(from)
        }
    }
    impl Program for Freezing {
        fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
            self.1 += 1;
            if self.1 == 3 {
                self.0.model.norm = self.0.model.norm.clone().freeze();
            }
            self.0.train(batch)
        }
    }
    let make = || {
        Freezing(
            Trained::new(Net::new(&device()), AdamWConfig::new().init(), 0.01),
            0,
        )
    };
    assert_exact("frozen", make);
}

/// Trains and saves like [`Trained`], but for one fault.
struct Faulty {
    trained: Trained<Net>,
    settled: bool,
}

impl Stateful for Faulty {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        if self.settled {
            module::settle(&self.trained.model);
        }
        let Trained { model, optimizer, .. } = &self.trained;
        out.scope("model", |out| module::write(model, out))?;
        out.scope("optimizer", |out| optimizer::write(optimizer, model, out))
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        let Trained { model, optimizer, .. } = &mut self.trained;
        *model = from.scope("model", |from| module::read(model.clone(), from))?;
        *optimizer = from.scope("optimizer", |from| {
            optimizer::read(optimizer.clone(), model, from)
        })?;
        Ok(())
    }
}

impl Program for Faulty {
    fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
        self.trained.train(batch)
    }
}

fn faulty(settled: bool) -> Faulty {
    Faulty {
        trained: Trained::new(Net::new(&device()), AdamWConfig::new().init(), 0.01),
        settled,
    }
}

/// The first step and component that the journal names when a run is cut short after step 6 and goes on from 4.
fn named(options: impl Fn(&Path) -> Options, settled: bool) -> Option<(u64, String)> {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    live(options(&path), faulty(settled), 6).unwrap();
    match live(options(&path), faulty(settled), u64::MAX) {
        Ok(()) => None,
        Err(Error::Diverged { step, component, .. }) => Some((step, component)),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn without_a_fault_the_journal_names_nothing() {
    assert_eq!(named(options, true), None);
}

/// Dropout after a resume draws what a new process draws.
#[test]
fn without_keys_for_the_device_the_journal_names_the_loss_of_the_first_step() {
    assert_eq!(named(plain_options, true), Some((5, "log/loss".to_owned())));
}

/// The loss cannot show it: training uses a batch's own statistics. The running ones are an update behind from the
/// resume on, for ever, and the model is worse than it was.
#[test]
fn without_the_cure_for_running_statistics_the_journal_names_the_model() {
    assert_eq!(named(options, false), Some((5, "state/model".to_owned())));
}

#[test]
fn burns_own_records_are_an_update_behind_and_ours_are_not() {
    let _turn = turn();
    let device = device();
    device.seed(1);
    let net = Net::new(&device);
    let mean = |net: &Net| {
        let bytes = net.clone().into_record().into_bytes().unwrap();
        let tensors = burn_pack::Reader::from_bytes(bytes)
            .unwrap()
            .into_tensors()
            .unwrap();
        let tensor = tensors
            .iter()
            .find(|tensor| tensor.name == "norm.running_mean")
            .unwrap();
        tensor.to_bytes().unwrap().to_vec()
    };
    let fresh = mean(&net);
    net.loss(&[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], &device);
    assert_eq!(
        mean(&net),
        fresh,
        "Burn has changed: `settle` may not be needed any more"
    );
    module::settle(&net);
    assert_ne!(mean(&net), fresh);
}

#[test]
fn another_module_and_another_optimizer_are_refused_by_name() {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let trained = |optimizer: ModuleOptimizer| Trained::new(Net::new(&device()), optimizer, 0.01);
    live(options(&path), trained(AdamWConfig::new().init()), 6).unwrap();

    let mut wider = trained(AdamWConfig::new().init());
    wider.model.last = LinearConfig::new(8, 3).init(&device());
    let error = live(options(&path), wider, 9).unwrap_err().to_string();
    assert!(
        error.contains("`last.weight` is [8, 2] in the checkpoint and [8, 3] in the program"),
        "{error}"
    );

    let mut shorter = trained(AdamWConfig::new().init());
    shorter.model.last.bias = None;
    let error = live(options(&path), shorter, 9).unwrap_err().to_string();
    assert!(error.contains("`last.bias` is not in the program"), "{error}");

    let error = live(options(&path), trained(SgdConfig::new().init()), 9)
        .unwrap_err()
        .to_string();
    assert!(error.contains("the optimizer took 0 of"), "{error}");
}

#[test]
fn two_processes_make_the_same_parameters_from_the_seed_of_the_run() {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let weights = |name: &str, drawn_before: u64| {
        device().seed(drawn_before);
        let path = home.path().join(name);
        let mut trained = Trained::new(Net::new(&device()), AdamWConfig::new().init(), 0.01);
        drop(options(&path).start(&mut trained).unwrap());
        let first: &Param<Tensor<2>> = &trained.model.first.weight;
        first.val().into_data().into_parts().0.to_vec()
    };
    assert_eq!(weights("a", 1), weights("b", 2));
}

struct Keep;

impl Batcher<[f32; 4], Vec<[f32; 4]>> for Keep {
    fn batch(&self, items: Vec<[f32; 4]>, _device: &Device) -> Vec<[f32; 4]> {
        items
    }
}

impl Batcher<u64, Vec<u64>> for Keep {
    fn batch(&self, items: Vec<u64>, _device: &Device) -> Vec<u64> {
        items
    }
}

/// Two epochs as Burn's own loops go through a loader: each batch, and what the device draws after it.
fn epochs(workers: usize, first_epoch: u64) -> Vec<Vec<(Vec<[f32; 4]>, f32)>> {
    let loader = ExactLoader::new(Numbers, Keep, 5, &device(), move |loader| {
        loader.shuffled().workers(workers)
    });
    let loader = loader.training(7, first_epoch);
    let draw = || Tensor::<1>::random([1], Distribution::Default, &device()).into_scalar::<f32>();
    let epoch = |_| {
        let mut batches = loader.iter();
        let mut seen = Vec::new();
        for batch in batches.by_ref() {
            seen.push((batch.unwrap(), draw()));
        }
        assert!(batches.progress().is_completed());
        seen
    };
    (0..2).map(epoch).collect()
}

#[test]
fn burns_own_loops_get_the_same_batches_and_draws_for_any_number_of_workers() {
    let _turn = turn();
    let expected = epochs(0, 0);
    assert_eq!(expected[0].len(), 5);
    assert_ne!(expected[0], expected[1]);
    assert_eq!(epochs(3, 0), expected);
    device().seed(99);
    assert_eq!(
        epochs(2, 1)[0],
        expected[1],
        "a loop that goes on at epoch 1 gets epoch 1"
    );
}

#[test]
fn a_slice_of_a_loader_serves_its_own_samples_only() {
    struct Indices;
    impl Source for Indices {
        type Item = u64;
        fn len(&self) -> u64 {
            24
        }
        fn at(&self, sample: &Sample) -> std::result::Result<u64, Failure> {
            Ok(sample.index)
        }
    }
    let loader = ExactLoader::new(Indices, Keep, 4, &device(), |loader| loader.shuffled());
    let slice = loader.slice(6, 16).to_device(&device()).slice(1, 10);
    assert_eq!(slice.num_items(), 9);
    let mut indices: Vec<u64> = slice.iter().flat_map(|batch| batch.unwrap()).collect();
    indices.sort_unstable();
    assert_eq!(indices, (7..16).collect::<Vec<_>>());
}

/// A net that never gets better, as Burn's Learner trains it: the learning rate is 0.
#[derive(Module, Debug)]
struct Still {
    layer: Linear,
}

impl Still {
    fn output(&self, input: Tensor<2>) -> RegressionOutput {
        let output = self.layer.forward(input.clone());
        let targets = input.zeros_like();
        RegressionOutput::new(output.clone().powi_scalar(2).mean(), output, targets)
    }
}

impl TrainStep for Still {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, input: Tensor<2>) -> TrainOutput<RegressionOutput> {
        let output = self.output(input);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Still {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, input: Tensor<2>) -> RegressionOutput {
        self.output(input)
    }
}

struct Rows;

impl Batcher<[f32; 4], Tensor<2>> for Rows {
    fn batch(&self, items: Vec<[f32; 4]>, device: &Device) -> Tensor<2> {
        Tensor::<1>::from_floats(items.as_flattened(), device).reshape([items.len(), 4])
    }
}

/// Numbers that cannot be read any more in the third epoch's last batch, as long as the disk is broken.
struct Breaking(Arc<AtomicBool>);

impl Source for Breaking {
    type Item = [f32; 4];

    fn len(&self) -> u64 {
        Numbers.len()
    }

    fn at(&self, sample: &Sample) -> std::result::Result<[f32; 4], Failure> {
        if self.0.load(Ordering::Relaxed) && (sample.epoch, sample.position) >= (2, 20) {
            return Err("the disk is gone".into());
        }
        Numbers.at(sample)
    }
}

/// Trains up to eight epochs under Burn's Learner, which is to stop when two in sequence were no better.
fn learn(path: &Path, layout: LinearLayout, broken: bool) -> Result<()> {
    learn_with(path, layout, broken, |exact, net| {
        exact.learner(net, SgdConfig::new().init(), 0.0)
    })
}

fn learn_with(
    path: &Path,
    layout: LinearLayout,
    broken: bool,
    learner: impl FnOnce(&Exact<Still>, Still) -> Learner<Still>,
) -> Result<()> {
    let device = device();
    device.seed(3);
    let layer = LinearConfig::new(4, 4).with_layout(layout).init(&device);
    let source = Breaking(Arc::new(AtomicBool::new(broken)));
    let train = ExactLoader::new(source, Rows, 4, &device, |loader| loader.shuffled());
    let valid = ExactLoader::new(Numbers, Rows, 12, &device.clone().inner(), |loader| loader);
    let exact = Exact::<Still>::new(plain_options(path), &device, train.loader());
    let stopping = MetricEarlyStoppingStrategy::new(
        &LossMetric::new(),
        Aggregate::Mean,
        Direction::Lowest,
        Split::Valid,
        StoppingCondition::NoImprovementSince { n_epochs: 2 },
    );
    let metrics = path.with_extension("metrics");
    SupervisedTraining::new(metrics, Arc::new(train), Arc::new(valid))
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .num_epochs(8)
        .early_stopping(stopping)
        .with_training_strategy(exact.strategy())
        .launch(learner(&exact, Still { layer }));
    exact.result()
}

/// The first epoch is the best, so that the third is the last. A life ends in the third: that the first was the best is
/// known from the metrics' files only.
#[test]
fn early_stopping_under_the_learner_remembers_the_epochs_before_a_resume() {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let place = |name: &str| home.path().join(format!("{layout:?}-{name}"));
        let (reference, cut) = (place("reference"), place("cut"));
        learn(&reference, layout, false).unwrap();
        let finished = read_checkpoint(&reference).unwrap().info().clone();
        assert_eq!((finished.step, finished.phase), (18, 2));
        let error = learn(&cut, layout, true).unwrap_err();
        assert!(error.to_string().contains("the disk is gone"), "{error}");
        assert_eq!(read_checkpoint(&cut).unwrap().info().step, 16);
        learn(&cut, layout, false).unwrap();
        let finished = read_checkpoint(&cut).unwrap().info().clone();
        assert_eq!((finished.step, finished.phase), (18, 2));
        assert_eq!(records(&reference), records(&cut));
    }
}

#[test]
fn a_learner_whose_optimizer_nobody_knows_is_refused_before_the_first_step() {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let error = learn_with(&path, LinearLayout::Row, false, |_, net| {
        Learner::new(net, SgdConfig::new().init(), 0.0)
    })
    .unwrap_err();
    assert!(error.to_string().contains("exact.learner"), "{error}");
    assert!(!path.exists());
}

#[derive(Module, Debug)]
struct Wide {
    layer: Linear,
    norm: BatchNorm,
}

/// A net whose statistics every step brings forward, and whose matrix is another one from the eighth step on.
struct Replaced {
    net: Wide,
    /// What is known of it; without, it is written whole every time.
    known: Option<module::Known>,
    steps: u64,
}

impl Replaced {
    fn new(known: Option<module::Known>) -> Replaced {
        let layer = LinearConfig::new(4, 9000).init(&device());
        let norm = BatchNormConfig::new(9000).init(&device());
        let net = Wide { layer, norm };
        Replaced { net, known, steps: 0 }
    }
}

impl Stateful for Replaced {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        let Replaced { net, known, .. } = self;
        out.scope("net", |out| match known {
            Some(known) => known.write(net, out),
            None => {
                module::settle(net);
                module::write(net, out)
            }
        })
    }

    fn restore(&mut self, _from: &mut StateReader<'_>) -> Result<()> {
        unreachable!("this one is never started again")
    }
}

impl Program for Replaced {
    fn train(&mut self, batch: &[[f32; 4]]) -> f32 {
        self.steps += 1;
        if self.steps == 8 {
            self.net.layer = LinearConfig::new(9, 9000).init(&device());
        }
        let width = self.net.layer.weight.dims()[0];
        let input = Tensor::<1>::from_floats(batch.as_flattened(), &device()).reshape([batch.len(), 4]);
        let input = input.repeat_dim(1, 3).slice([0..batch.len(), 0..width]);
        let output = self.net.norm.forward(self.net.layer.forward(input));
        output.mean().into_scalar::<f32>()
    }
}

#[test]
fn a_module_that_is_known_has_the_records_of_one_that_is_written_whole() {
    let _turn = turn();
    let home = tempfile::tempdir().unwrap();
    let lives = [None, Some(module::Known::default())].map(|known| {
        let path = home.path().join(format!("{}", known.is_some()));
        let options = options(&path).journal(Level::Sampled);
        live(options, Replaced::new(known), u64::MAX).unwrap();
        records(&path)
    });
    assert_eq!(lives[0].len(), 14);
    let digests = lives[0].iter().map(|boundary| &boundary.components);
    let changes = digests
        .clone()
        .zip(digests.skip(1))
        .filter(|(one, next)| one != next);
    assert_eq!(changes.count(), 13);
    assert_eq!(lives[0], lives[1]);
}
