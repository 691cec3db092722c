#include "data/image_folder.h"

#include "data/evaluation_batches.h"
#include "data/load_dataset.h"
#include "data/training_batches.h"
#include "eval/draw_images.h"
#include "expect_user_error.h"
#include "image_files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <future>
#include <map>
#include <thread>

namespace m2teacher {
namespace {

class ImageFolder : public testing::Test {
 protected:
  void write(const std::string& name, const std::string& bytes) {
    std::filesystem::create_directories((root_ / name).parent_path());
    write_bytes(root_ / name, bytes);
  }
  DataOptions options() const {
    DataOptions options;
    options.spec = {.kind = DataSpec::Kind::Folder, .folder = root_ / ""};
    options.image_size = 32;
    return options;
  }
  Dataset load() const { return load_dataset(options()); }
  std::shared_ptr<const FolderSource> train() const {
    return std::dynamic_pointer_cast<const FolderSource>(load().train);
  }

  TemporaryFolder root_;
};

std::vector<int64_t> numbers(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<int64_t>(), tensor.const_data_ptr<int64_t>() + tensor.numel()};
}

TEST_F(ImageFolder, FirstFoldersAreLabels) {
  const std::string image = png_bytes(ramp(8, 8));
  for (const char* name : {"train/dog/b.PNG", "train/cat/deep/er/a.jpeg", "train/cat/z.jpg", "train/dog/notes.txt",
                           "train/.hidden/x.png", "train/dog/._b.png", "val/dog/1.png", "val/cat/2.png"}) {
    write(name, image);
  }
  const Dataset dataset = load();
  EXPECT_EQ(dataset.class_names, (std::vector<std::string>{"cat", "dog"}));
  EXPECT_EQ(numbers(dataset.train->labels()), (std::vector<int64_t>{0, 0, 1}));
  EXPECT_EQ(numbers(dataset.test->labels()), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(dataset.train->shape(), (ImageShape{.channels = 3, .height = 32, .width = 32}));
  EXPECT_EQ(dataset.pixels, imagenet_pixels());
  write("test/dog/1.png", image);
  EXPECT_EQ(load().test->size(), 1);
  write("test/fox/1.png", image);
  expect_user_error([&] { load(); }, "test/fox/1.png: is of class 'fox', of which there are no training images");
}

TEST_F(ImageFolder, WithoutFoldersThereAreNoLabels) {
  expect_user_error([&] { load(); }, "holds no image");
  write("a.png", png_bytes(ramp(8, 8)));
  write("some/b.png", png_bytes(ramp(8, 8)));
  const Dataset dataset = load();
  EXPECT_EQ(dataset.train->size(), 2);
  EXPECT_FALSE(dataset.train->labels().defined());
  EXPECT_EQ(dataset.classes(), 0);
  EXPECT_EQ(dataset.test, nullptr);
}

bool any_contains(const std::vector<std::string>& texts, const std::string& part) {
  return std::any_of(texts.begin(), texts.end(), [&](const std::string& text) { return contains(text, part); });
}

TEST_F(ImageFolder, AnImageBesideTheClassesHasNoLabelAndTheOthersKeepTheirs) {
  const std::string image = png_bytes(ramp(8, 8));
  for (const char* name : {"train/cover.png", "train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/a.png"}) {
    write(name, image);
  }
  const Dataset dataset = load();
  EXPECT_EQ(dataset.class_names, (std::vector<std::string>{"cat", "dog"}));
  EXPECT_EQ(numbers(dataset.train->labels()), (std::vector<int64_t>{0, -1, 1}));
  EXPECT_EQ(numbers(dataset.test->labels()), (std::vector<int64_t>{-1, 1}));
  EXPECT_EQ(numbers(labelled_images(*dataset.train)), (std::vector<int64_t>{0, 2}));
  ASSERT_EQ(dataset.notes.size(), 2);
  EXPECT_PRED2(contains, dataset.notes[0], "train: 1 of 3 images in no class's folder, the first: cover.png; without");
  EXPECT_PRED2(contains, dataset.notes[1], "test: 1 of 2 images in no class's folder, the first: a.png");
}

TEST_F(ImageFolder, ASingleFolderBesideImagesIsNoClassWhichIsSaid) {
  write("a.png", png_bytes(ramp(8, 8)));
  write("some/b.png", png_bytes(ramp(8, 8)));
  const Dataset dataset = load();
  EXPECT_FALSE(dataset.train->labels().defined());
  ASSERT_EQ(dataset.notes.size(), 1);
  EXPECT_PRED2(contains, dataset.notes[0],
               "1 of 2 images in no class's folder, the first: a.png; so no image has a label");
  // Images that all lie in none need no word.
  std::filesystem::remove_all(root_ / "some");
  EXPECT_TRUE(load().notes.empty());
}

TEST_F(ImageFolder, EachFolderIsSearchedOnceByItsOwnName) {
  const std::string image = png_bytes(ramp(8, 8));
  for (const char* name : {"images/train/a/1.png", "images/train/b/2.png", "images/test/b/3.png", "else/4.png"}) {
    write(name, image);
  }
  const std::filesystem::path train_folder = root_ / "images/train";
  std::filesystem::create_directory_symlink("..", train_folder / "a/up");
  std::filesystem::create_directory_symlink("../../..", train_folder / "a/far_up");  // holds the test images, too
  std::filesystem::create_directory_symlink("../b", train_folder / "a/b");
  std::filesystem::create_directory_symlink(root_ / "else", train_folder / "c");
  std::filesystem::create_directory_symlink(root_ / "else", train_folder / "d");
  DataOptions chosen = options();
  chosen.spec.folder = root_ / "images";
  const Dataset dataset = load_dataset(chosen);
  EXPECT_EQ(dataset.class_names, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(numbers(dataset.train->labels()), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_TRUE(any_contains(dataset.notes,
                           "4 links not followed to folders that are searched anyway or lie above, the first: a/b"));
}

TEST_F(ImageFolder, FilesOfOtherEndingsAreCountedInOneLine) {
  write("x/a.png", png_bytes(ramp(8, 8)));
  for (const char* name : {"x/b.webp", "x/c.WEBP", "y/d.gif", "notes", "e.tar", "f.txt", ".hidden.gif"}) {
    write(name, "");
  }
  const Dataset dataset = load();
  EXPECT_TRUE(any_contains(dataset.notes,
                           "6 files passed over, as images are files whose names end in .jpg, .jpeg or "
                           ".png (found: 2 of .webp, 1 of none, 1 of .gif, ...)"));
  EXPECT_EQ(dataset.notes.size(), 1);
}

TEST_F(ImageFolder, AFolderThatCannotBeSearchedIsNamed) {
  write("x/a.png", png_bytes(ramp(8, 8)));
  write("x/closed/b.png", png_bytes(ramp(8, 8)));
  std::filesystem::permissions(root_ / "x/closed", std::filesystem::perms::none);
  const uid_t user = geteuid();
  if (user == 0) {  // to whom nothing is closed
    std::filesystem::permissions(root_ / "", static_cast<std::filesystem::perms>(0755));
    constexpr uid_t kNobody = 65534;
    ASSERT_EQ(seteuid(kNobody), 0);
  }
  expect_user_error([&] { load(); }, "x/closed: cannot be searched for images: Permission denied");
  ASSERT_EQ(seteuid(user), 0);
  std::filesystem::permissions(root_ / "x/closed", std::filesystem::perms::owner_all);
}

/// The image's own coordinates at the corners of what was read, from the ramp's red and green.
struct Seen {
  double left, right, top, bottom;
};

Seen seen(const at::Tensor& pixels) {
  const at::Tensor image = pixels.to(at::kDouble) / 250;
  const int64_t last = image.size(0) - 1;
  return {image[last / 2][0][0].item<double>(), image[last / 2][last][0].item<double>(),
          image[0][last / 2][1].item<double>(), image[last][last / 2][1].item<double>()};
}

TEST_F(ImageFolder, ReadsThePartThatWasChosen) {
  write("small.png", png_bytes(ramp(60, 90)));
  write("wide.jpg", jpeg_bytes(ramp(300, 900)));  // shrunk as it is decoded
  const auto source = train();
  const CropBox box{.left = 0.25, .top = 0.5, .width = 0.5, .height = 0.4};
  for (const int64_t index : {0, 1}) {
    at::Tensor first = at::empty({32, 32, 3}, at::kByte);
    at::Tensor second = at::empty({32, 32, 3}, at::kByte);
    const auto choose = [&](int64_t height, int64_t width) {
      EXPECT_EQ(width > height, true);
      return std::vector<CropBox>{box, CropBox{}};
    };
    ASSERT_TRUE(source->read(index, choose, {first.data_ptr<uint8_t>(), second.data_ptr<uint8_t>()}));
    const Seen part = seen(first);
    EXPECT_NEAR(part.left, 0.25, 0.03);
    EXPECT_NEAR(part.right, 0.75, 0.03);
    EXPECT_NEAR(part.top, 0.5, 0.03);
    EXPECT_NEAR(part.bottom, 0.9, 0.03);
    const Seen whole = seen(second);
    EXPECT_NEAR(whole.left, 0, 0.03);
    EXPECT_NEAR(whole.bottom, 1, 0.03);
    ASSERT_TRUE(source->read_centre(index, first.data_ptr<uint8_t>()));
    const Seen centre = seen(first);
    EXPECT_NEAR(centre.top, 0.0625, 0.03);
    EXPECT_NEAR(centre.bottom, 0.9375, 0.03);
    const double shorter = index == 0 ? 60.0 / 90 : 300.0 / 900;
    EXPECT_NEAR(centre.right - centre.left, 0.875 * shorter, 0.03);
    EXPECT_NEAR(centre.right + centre.left, 1, 0.03);
  }
}

TEST_F(ImageFolder, ScalesAsAnAntialiasedTriangleFilterInDouble) {
  const at::Tensor pixels = at::randint(0, 256, {80, 50, 3}, at::kByte);
  write("noise.png", png_bytes(pixels));
  at::Tensor read = at::empty({32, 32, 3}, at::kByte);
  ASSERT_TRUE(train()->read(0, [](int64_t, int64_t) { return std::vector<CropBox>{{}}; }, {read.data_ptr<uint8_t>()}));
  const auto weights = [](int64_t from) {
    const double scale = static_cast<double>(from) / 32;
    const at::Tensor centre = (at::arange(32, at::kDouble) + 0.5) * scale;
    const at::Tensor distance = (at::arange(from, at::kDouble) + 0.5 - centre.unsqueeze(1)).abs() / scale;
    const at::Tensor weight = (1 - distance).clamp_min(0);
    return weight / weight.sum(1, /*keepdim=*/true);
  };
  const at::Tensor expected = at::einsum("yh,hwc,xw->yxc", {weights(80), pixels.to(at::kDouble), weights(50)});
  EXPECT_LE((read.to(at::kDouble) - expected).abs().max().item<double>(), 1.01);
}

TEST_F(ImageFolder, UnreadableImagesAreCountedNamedOnceAndPassedOver) {
  for (int i = 0; i < 6; ++i) {
    write("x/" + std::to_string(i) + ".png", png_bytes(ramp(40, 40, 40 * i)));
  }
  write("x/2.png", "no image");
  const auto source = train();
  at::Tensor into = at::empty({32, 32, 3}, at::kByte);
  testing::internal::CaptureStderr();
  EXPECT_FALSE(source->read_centre(2, into.data_ptr<uint8_t>()));
  EXPECT_FALSE(source->read_centre(2, into.data_ptr<uint8_t>()));
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_PRED2(contains, said, "x/2.png: unreadable image: is neither a JPEG nor a PNG file");
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
  EXPECT_EQ(source->unreadable(), 1);

  auto evaluation = make_evaluation_batches(source, at::arange(6), 4, {.threads = 3});
  const auto first = evaluation->next();
  EXPECT_EQ(numbers(first->index), (std::vector<int64_t>{0, 1, 3}));
  EXPECT_EQ(first->images.sizes(), at::IntArrayRef({3, 3, 32, 32}));
  EXPECT_EQ(first->images[2][2][5][5].item<int64_t>(), 120);
  EXPECT_EQ(numbers(evaluation->next()->index), (std::vector<int64_t>{4, 5}));
  EXPECT_FALSE(evaluation->next().has_value());

  // In training the next image takes the place: all blues but that of image 2 are seen, 3's twice.
  const auto batches = make_training_batches({.source = source, .pixels = {}, .loader = {.threads = 2}}, {}, 6, 0, 1);
  const at::Tensor blue = std::get<0>(batches->batch(0).views.at(0).select(1, 2).amax({1, 2}).sort());
  EXPECT_TRUE(at::equal(blue, at::tensor({0, 40, 120, 120, 160, 200}, at::kByte)));

  DataOptions strict = options();
  strict.strict = true;
  const auto picky = load_dataset(strict).train;
  expect_user_error([&] { make_evaluation_batches(picky, at::arange(6), 4, {.threads = 3})->next(); },
                    "x/2.png: unreadable image");
  const auto stops = make_training_batches({.source = picky, .pixels = {}, .loader = {.threads = 2}}, {}, 6, 0, 1);
  expect_user_error([&] { stops->batch(0); }, "x/2.png: unreadable image");
}

TEST_F(ImageFolder, NothingButUnreadableImagesIsAnError) {
  write("a.png", "no image");
  write("b.png", "no image");
  const auto batches = make_training_batches({.source = train(), .pixels = {}, .loader = {}}, {}, 2, 0, 1);
  expect_user_error([&] { batches->batch(0); }, "2 unreadable images in a row");
}

TEST_F(ImageFolder, BatchesDependOnSeedAndStepAlone) {
  for (int i = 0; i < 12; ++i) {
    write(std::to_string(i) + ".jpg", jpeg_bytes(ramp(50, 70, 20 * i)));
  }
  const auto batches = [&](int threads, uint64_t seed) {
    return make_training_batches({.source = train(), .pixels = {}, .loader = {.threads = threads}}, {}, 5, seed, 6);
  };
  const auto alone = batches(1, 3);
  std::vector<TrainingBatch> expected;
  for (int64_t step = 0; step < 6; ++step) {
    expected.push_back(alone->batch(step));
    EXPECT_TRUE(expected.back().cropped);
    EXPECT_FALSE(at::equal(expected.back().views[0], expected.back().views[1]));
  }
  const auto many = batches(5, 3);
  for (const int64_t step : {2, 3, 4, 0, 5, 1}) {  // in turn, and out of turn
    const TrainingBatch batch = many->batch(step);
    EXPECT_TRUE(at::equal(batch.views[0], expected[static_cast<size_t>(step)].views[0])) << step;
    EXPECT_TRUE(at::equal(batch.views[1], expected[static_cast<size_t>(step)].views[1])) << step;
  }
  EXPECT_FALSE(at::equal(batches(1, 4)->batch(0).views[0], expected[0].views[0]));
}

TEST_F(ImageFolder, SharesAreSlicesOfTheBatch) {
  for (int i = 0; i < 12; ++i) {
    write(std::to_string(i) + ".jpg", jpeg_bytes(ramp(50, 70, 20 * i)));
  }
  const at::Tensor kept = at::randint(0, 256, {12, 1, 4, 4}, at::kByte);
  const std::vector<std::shared_ptr<const ImageSource>> sources = {train(),
                                                                   std::make_shared<TensorSource>(kept, at::Tensor())};
  constexpr int64_t kBatch = 5;
  constexpr int64_t kRanks = 3;
  for (const auto& source : sources) {
    const TrainingData data{.source = source, .pixels = {}, .loader = {.threads = 2}};
    const TrainingBatch whole = make_training_batches(data, {}, kBatch, 3, 6)->batch(4);
    int64_t place = 0;
    for (int64_t rank = 0; rank < kRanks; ++rank) {
      const BatchShare share = share_of_batch(kBatch, rank, kRanks);
      EXPECT_EQ(share.first, place);
      EXPECT_NEAR(static_cast<double>(share.count), 5.0 / 3, 1);
      const TrainingBatch part = make_training_batches(data, {}, kBatch, share, 3, 6)->batch(4);
      for (const size_t view : {0, 1}) {
        EXPECT_TRUE(at::equal(part.views.at(view), whole.views.at(view).narrow(0, place, share.count))) << rank;
      }
      place += share.count;
    }
    EXPECT_EQ(place, kBatch);
  }
}

/// Images in memory, one of which a file system holds that does not answer for now.
class StuckSource : public TensorSource {
 public:
  StuckSource() : TensorSource(at::zeros({2, 3, 8, 8}, at::kByte), at::Tensor()) {}

  at::Tensor in_memory() const override { return {}; }
  bool read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const override {
    if (index == 1) {
      answer_.get_future().wait();
    }
    return TensorSource::read(index, choose, into);
  }
  void let_go() { answer_.set_value(); }

 private:
  mutable std::promise<void> answer_;
};

TEST(StuckImages, AFileThatNeverAnswersIsAnErrorNotAHang) {
  const auto source = std::make_shared<StuckSource>();
  const auto start = std::chrono::steady_clock::now();
  {
    const TrainingData data{.source = source, .pixels = {}, .loader = {.threads = 2, .timeout_seconds = 0.3}};
    const auto batches = make_training_batches(data, {}, 2, 0, 1);
    expect_user_error([&] { batches->batch(0); }, "no image has come in for");
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  // The thread that was left to itself ends, if it got as far.
  source->let_go();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

TEST_F(ImageFolder, WhatIsNoFileOrTooLargeIsUnreadableAndNamed) {
  write("a/ok.png", png_bytes(ramp(8, 8)));
  ASSERT_EQ(mkfifo((root_ / "a/pipe.png").c_str(), 0600), 0);  // opening it would wait for a writer, which never comes
  write("a/sparse.png", png_bytes(ramp(8, 8)));
  std::filesystem::resize_file(root_ / "a/sparse.png", uint64_t{20} << 30);
  std::filesystem::create_symlink("nowhere.png", root_ / "a/to_nothing.png");
  const auto source = train();
  ASSERT_EQ(source->size(), 4);
  at::Tensor into = at::empty({32, 32, 3}, at::kByte);
  const std::map<int64_t, std::string> reasons = {
      {1, "pipe.png: unreadable image: is no regular file"},
      {2, "sparse.png: unreadable image: has 21474836480 bytes"},
      {3, "to_nothing.png: unreadable image: cannot be opened: No such file"}};
  EXPECT_TRUE(source->read_centre(0, into.data_ptr<uint8_t>()));
  for (const auto& [index, reason] : reasons) {
    testing::internal::CaptureStderr();
    EXPECT_FALSE(source->read_centre(index, into.data_ptr<uint8_t>()));
    EXPECT_PRED2(contains, testing::internal::GetCapturedStderr(), reason);
  }
  EXPECT_EQ(source->unreadable(), 3);
}

TEST(TensorSource, ReadsPartsAndTheWholeAsFoldersDo) {
  const at::Tensor images = at::randint(0, 256, {2, 1, 6, 4}, at::kByte);
  const TensorSource source(images, at::Tensor());
  const at::Tensor whole = at::empty({6, 4, 1}, at::kByte);
  EXPECT_TRUE(source.read_centre(1, whole.data_ptr<uint8_t>()));
  EXPECT_TRUE(at::equal(whole.permute({2, 0, 1}), images[1]));
  const auto lower_half = [](int64_t height, int64_t width) {
    EXPECT_EQ(height, 6);
    EXPECT_EQ(width, 4);
    return std::vector<CropBox>{{.left = 0, .top = 0.5, .width = 1, .height = 0.5}};
  };
  EXPECT_TRUE(source.read(0, lower_half, {whole.data_ptr<uint8_t>()}));
  const at::Tensor expected =
      at::_upsample_bilinear2d_aa(images.narrow(0, 0, 1).narrow(2, 3, 3).to(at::kDouble), {6, 4}, false);
  EXPECT_LE((whole.permute({2, 0, 1}).to(at::kDouble) - expected[0]).abs().max().item<double>(), 1.01);
}

TEST(MemoryBatches, AreTheImagesOfTheSampler) {
  const at::Tensor images = at::randint(0, 256, {10, 1, 4, 4}, at::kByte);
  const auto source = std::make_shared<TensorSource>(images, at::Tensor());
  const auto batches = make_training_batches({.source = source, .pixels = {}, .loader = {}}, {}, 4, 7, 100);
  BatchSampler sampler(10, 4, 7);
  for (const int64_t step : {0, 1, 2, 1}) {
    const TrainingBatch batch = batches->batch(step);
    EXPECT_FALSE(batch.cropped);
    EXPECT_TRUE(at::equal(batch.views[0], images.index_select(0, sampler.batch(step))));
  }
  auto evaluation = make_evaluation_batches(source, at::arange(7), 4, {});
  EXPECT_TRUE(at::equal(evaluation->next()->images, images.narrow(0, 0, 4)));
  const auto last = evaluation->next();
  EXPECT_TRUE(at::equal(last->images, images.narrow(0, 4, 3)));
  EXPECT_EQ(numbers(last->index), (std::vector<int64_t>{4, 5, 6}));
  EXPECT_FALSE(evaluation->next().has_value());
}

}  // namespace
}  // namespace m2teacher
