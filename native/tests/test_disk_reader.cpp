// Disk readers: every kind brings the same bytes and reports the end of a file; a kernel that forbids
// io_uring is noticed; a changed file is, too.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "gguf_bytes.h"
#include "io/disk_reader.h"
#include "util/error.h"
#include "util/memory.h"

namespace turbosparse {
namespace {

constexpr std::size_t kBlocks = 300;

/// A file whose 4-byte words count up, in a folder of its own.
class TempFile {
 public:
  TempFile() {
    std::string folder = (std::filesystem::temp_directory_path() / "turbosparse-XXXXXX").string();
    if (::mkdtemp(folder.data()) == nullptr) std::abort();
    folder_ = folder;
    std::vector<std::uint32_t> words(kBlocks * kDiskBlock / sizeof(std::uint32_t));
    std::iota(words.begin(), words.end(), 0);
    std::ofstream(path(), std::ios::binary)
        .write(reinterpret_cast<const char*>(words.data()),
               static_cast<std::streamsize>(kBlocks * kDiskBlock));
  }
  ~TempFile() { std::filesystem::remove_all(folder_); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  std::string path() const { return folder_ / "data"; }

 private:
  std::filesystem::path folder_;
};

void test_reads(const char* name) {
  const TempFile temp;
  const auto file = std::make_shared<const DiskFile>(temp.path(), std::string(name) != "mmap");
  const std::unique_ptr<DiskReader> reader = open_disk_reader(file, name).reader;
  CHECK(std::string(reader->name()) == name, "%s", reader->name());
  CHECK(file->unchanged(), "%s", name);
  std::vector<DiskDone> done(7);
  CHECK(reader->wait(done) == 0, "%s: nothing was asked for", name);
  // Block b is read at once with its successor; the last has none.
  Arena memory(2 * kBlocks * kDiskBlock);
  std::byte* const to = memory.take(2 * kBlocks * kDiskBlock);
  std::vector<int> errors(kBlocks, 1);
  std::size_t asked = 0, ended = 0;
  while (ended < kBlocks) {
    for (; asked < kBlocks && asked - ended < reader->depth(); ++asked) {
      const DiskRead read{asked * kDiskBlock, 2 * kDiskBlock, to + asked * 2 * kDiskBlock, asked};
      reader->start({&read, 1});
    }
    const std::size_t count = reader->wait(done);
    CHECK(count > 0, "%s: %zu of %zu", name, ended, asked);
    if (count == 0) return;
    for (std::size_t i = 0; i < count; ++i) errors[done[i].tag] = done[i].error;
    ended += count;
  }
  for (std::size_t b = 0; b < kBlocks; ++b) {
    const bool last = b + 1 == kBlocks;
    CHECK(errors[b] == (last ? kEndOfFile : 0), "%s block %zu: %s", name, b,
          disk_error_text(errors[b]).c_str());
    const auto* words = reinterpret_cast<const std::uint32_t*>(to + b * 2 * kDiskBlock);
    const std::size_t count = 2 * kDiskBlock / sizeof(std::uint32_t);
    CHECK(last || (words[0] == b * count / 2 && words[count - 1] == b * count / 2 + count - 1),
          "%s block %zu", name, b);
  }
}

void test_changes() {
  const TempFile temp;
  const DiskFile file(temp.path(), true);
  std::filesystem::rename(temp.path(), temp.path() + "-moved");
  CHECK(file.unchanged(), "a file with another name");
  std::filesystem::resize_file(temp.path() + "-moved", kDiskBlock);
  CHECK(!file.unchanged(), "a shorter file");
}

/// Files in /proc have none.
void test_no_direct_reads() {
  const auto file = std::make_shared<const DiskFile>("/proc/self/status", true);
  const std::string note = open_disk_reader(file, "pread").note;
  CHECK(file->through_cache() && note.find("page cache") != std::string::npos, "%s", note.c_str());
  CHECK(open_disk_reader(file, "").note.starts_with(note), "another reader");
  const DiskFile cached("/proc/self/status", false);
  CHECK(!cached.through_cache(), "O_DIRECT was not asked for");
}

void test_a_file_in_the_place_of_another() {
  const TempFile temp;
  const test::Bytes bytes = test::GgufSpec{}.build();
  const auto write = [&](const std::string& path) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data.data()),
               static_cast<std::streamsize>(bytes.data.size()));
  };
  const std::string path = temp.path() + ".gguf";
  write(path);
  const auto model = GgufFile::open(path);
  CHECK(DiskFile(*model, false).bytes() == bytes.data.size(), "the same file");
  write(path + "-new");
  std::filesystem::rename(path + "-new", path);
  std::string error;
  try {
    const DiskFile other(*model, false);
  } catch (const ModelFileError& refused) {
    error = refused.what();
  }
  CHECK(error == "[" + path + "] expected it as it was when it was opened, got another file", "%s",
        error.c_str());
}

void test_names() {
  const TempFile temp;
  const auto file = std::make_shared<const DiskFile>(temp.path(), true);
  bool refused = false;
  try {
    (void)open_disk_reader(file, "floppy");
  } catch (const ConfigError&) {
    refused = true;
  }
  CHECK(refused, "an unknown reader");
  bool missing = false;
  try {
    const DiskFile none(temp.path() + "-none", true);
  } catch (const ModelFileError&) {
    missing = true;
  }
  CHECK(missing, "a missing file");
}

/// Forbids this process a system call, for good. False on a system that can't.
bool forbid(std::uint32_t call) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{std::size(program), program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/// In a child process, which can't take a ban back.
template <class F>
void check_in_child(const char* what, F&& works) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(works() ? 0 : 1);
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
        "%s: status %d", what, status);
}

bool falls_back_to_pread(std::uint32_t without) {
  const TempFile temp;
  if (!forbid(without)) return true;
  const auto file = std::make_shared<const DiskFile>(temp.path(), true);
  const OpenedReader opened = open_disk_reader(file, "");
  try {
    (void)open_disk_reader(file, "io_uring");
    return false;
  } catch (const ConfigError&) {
  }
  return std::string(opened.reader->name()) == "pread" && opened.note.find("permitted") != std::string::npos;
}

/// A ring that stops working while it is in use: reads fail, and nobody waits for ever.
bool fails_when_the_ring_breaks() {
  const TempFile temp;
  const auto file = std::make_shared<const DiskFile>(temp.path(), true);
  std::string why_not;
  const std::unique_ptr<DiskReader> reader = make_uring_reader(file, &why_not);
  if (!reader || !forbid(__NR_io_uring_enter)) return true;
  Arena memory(3 * kDiskBlock);
  std::byte* const to = memory.take(3 * kDiskBlock);
  bool all_failed = true;
  for (int round = 0; round < 2; ++round) {
    std::vector<DiskRead> reads;
    for (std::size_t b = 0; b < 3; ++b) reads.push_back({b * kDiskBlock, kDiskBlock, to + b * kDiskBlock, b});
    reader->start(reads);
    std::vector<DiskDone> done(2);
    for (const std::size_t expected : {2, 1, 0}) {
      const std::size_t count = reader->wait(done);
      all_failed = all_failed && count == expected;
      for (std::size_t i = 0; i < count; ++i) all_failed = all_failed && done[i].error == EPERM;
    }
  }
  return all_failed;
}

}  // namespace
}  // namespace turbosparse

int main() {
  for (const char* name : {"pread", "mmap"}) turbosparse::test_reads(name);
  std::string why_not;
  const auto self = std::make_shared<const turbosparse::DiskFile>("/proc/self/exe", false);
  if (turbosparse::make_uring_reader(self, &why_not)) turbosparse::test_reads("io_uring");
  turbosparse::test_changes();
  turbosparse::test_a_file_in_the_place_of_another();
  turbosparse::test_no_direct_reads();
  turbosparse::test_names();
  turbosparse::check_in_child("io_uring forbidden",
                              [] { return turbosparse::falls_back_to_pread(__NR_io_uring_setup); });
  turbosparse::check_in_child("io_uring half forbidden",
                              [] { return turbosparse::falls_back_to_pread(__NR_io_uring_enter); });
  turbosparse::check_in_child("io_uring forbidden in use", turbosparse::fails_when_the_ring_breaks);
  return turbosparse::test::report();
}
