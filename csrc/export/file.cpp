#include "file.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "llmdpd_policy.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files' numbers are little-endian"
#endif

namespace llmdpd {
namespace {

constexpr char kMagic[8] = {'L', 'L', 'M', 'D', 'P', 'D', '\r', '\n'};
constexpr std::uint32_t kVersion = 2;  // 1 has no tracks, and is read still
constexpr std::size_t kMaxTensors = 4096;
constexpr std::int64_t kMaxDimension = 1 << 24;  // products of two are no overflow

struct Header {
  char magic[8];
  std::uint32_t version, kind;
  std::uint64_t size, fingerprint;
  std::uint32_t checksum, tensors;
};
static_assert(sizeof(Header) == 40, "as it lies in the file");

struct Entry {
  char name[56];
  std::uint32_t type, dims;
  std::uint64_t offset;
  std::uint32_t shape[4];
};
static_assert(sizeof(Entry) == 88, "as it lies in the file");

// CRC-32 of IEEE 802.3, as zlib has it.
std::uint32_t checksum_of(const unsigned char* bytes, std::size_t count) {
  std::uint32_t table[256];
  for (std::uint32_t i = 0; i < 256; ++i) {
    table[i] = i;
    for (int bit = 0; bit < 8; ++bit) table[i] = table[i] & 1 ? table[i] >> 1 ^ 0xEDB88320u : table[i] >> 1;
  }
  std::uint32_t sum = 0xFFFFFFFFu;
  for (std::size_t i = 0; i < count; ++i) sum = sum >> 8 ^ table[(sum ^ bytes[i]) & 0xFF];
  return ~sum;
}

std::size_t width_of(std::uint32_t type) { return type == Tensor::kDouble ? 8 : 4; }

// -inf marks what is no step, and an absent clip is infinite; no other number may be.
bool may_be_infinite(const std::string& name) {
  return name == "bias" || name == "waypoint_bias" || name == "scalars";
}

template <class Number>
void check_numbers(const std::string& name, const Tensor& tensor) {
  const auto* numbers = static_cast<const Number*>(tensor.data);
  for (std::size_t i = 0; i < tensor.count; ++i) {
    if (std::isnan(numbers[i]) || (std::isinf(numbers[i]) && !may_be_infinite(name))) {
      refuse("NaN or Inf in " + name);
    }
  }
}

Tensor read_entry(const Entry& entry, const std::string& name, const unsigned char* bytes, std::size_t size) {
  if (entry.type < Tensor::kFloat || entry.type > Tensor::kDouble || entry.dims > 4) refuse("damaged: type of " + name);
  Tensor tensor{static_cast<Tensor::Type>(entry.type), {}, nullptr, 1};
  for (std::uint32_t i = 0; i < entry.dims; ++i) {
    if (entry.shape[i] > kMaxDimension) refuse("damaged: shape of " + name);
    tensor.shape.push_back(static_cast<int>(entry.shape[i]));
    tensor.count *= entry.shape[i];
    if (tensor.count > size) refuse("damaged: shape of " + name);  // before a product can overflow
  }
  if (entry.offset % 64 != 0 || entry.offset > size || tensor.count > (size - entry.offset) / width_of(entry.type)) {
    refuse("damaged: place of " + name);
  }
  tensor.data = bytes + entry.offset;
  if (tensor.type == Tensor::kFloat) check_numbers<float>(name, tensor);
  if (tensor.type == Tensor::kDouble) check_numbers<double>(name, tensor);
  return tensor;
}

}  // namespace

void refuse(const std::string& what) { throw Failure(LLMDPD_FORMAT, what); }

File::File(const void* given, std::size_t size, FileKind kind) {
  Header header;
  if (size < sizeof header) refuse("no exported file: too short");
  std::memcpy(&header, given, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) refuse("no exported file: wrong first bytes");
  if (header.version < 1 || header.version > kVersion) {
    refuse("of format version " + std::to_string(header.version) + "; expected at most " + std::to_string(kVersion));
  }
  if (header.kind != static_cast<std::uint32_t>(kind)) {
    refuse(kind == FileKind::kPolicy ? "this is no policy's file" : "this is no prompt's file");
  }
  if (header.size != size) {
    refuse("damaged: " + std::to_string(size) + " bytes; expected " + std::to_string(header.size));
  }
  const auto* raw = static_cast<const unsigned char*>(given);
  if (checksum_of(raw + sizeof header, size - sizeof header) != header.checksum) refuse("damaged: wrong checksum");
  if (header.tensors > kMaxTensors || header.tensors > (size - sizeof header) / sizeof(Entry)) {
    refuse("damaged: number of tensors");
  }
  fingerprint_ = header.fingerprint;
  auto* bytes = reinterpret_cast<unsigned char*>(memory_.reserve(size / sizeof(float) + 1));
  std::memcpy(bytes, given, size);
  for (std::uint32_t i = 0; i < header.tensors; ++i) {
    Entry entry;
    std::memcpy(&entry, bytes + sizeof header + i * sizeof entry, sizeof entry);
    if (std::memchr(entry.name, 0, sizeof entry.name) == nullptr) refuse("damaged: name of a tensor");
    const std::string name = entry.name;
    if (!tensors_.emplace(name, read_entry(entry, name, bytes, size)).second) refuse("damaged: twice " + name);
  }
}

const Tensor& File::tensor(const std::string& name, Tensor::Type type, std::size_t dims) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) refuse("missing: " + name);
  if (found->second.type != type || found->second.shape.size() != dims) refuse("wrong type or shape: " + name);
  return found->second;
}

const Tensor& File::exact(const std::string& name, Tensor::Type type, std::initializer_list<int> shape) const {
  const Tensor& found = tensor(name, type, shape.size());
  if (found.shape != std::vector<int>(shape)) refuse("wrong shape: " + name);
  return found;
}

const float* File::floats(const std::string& name, std::initializer_list<int> shape) const {
  return static_cast<const float*>(exact(name, Tensor::kFloat, shape).data);
}
const double* File::doubles(const std::string& name, std::initializer_list<int> shape) const {
  return static_cast<const double*>(exact(name, Tensor::kDouble, shape).data);
}
const std::int32_t* File::integers(const std::string& name, std::initializer_list<int> shape) const {
  return static_cast<const std::int32_t*>(exact(name, Tensor::kInteger, shape).data);
}

std::vector<unsigned char> read_bytes(const char* path) {
  struct Close {
    void operator()(std::FILE* open) const { std::fclose(open); }
  };
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
  const auto fail = [&](const char* what) { throw Failure(LLMDPD_FILE, std::string(what) + ": " + path); };
  if (!file) fail("cannot be opened");
  std::vector<unsigned char> bytes;
  unsigned char part[1 << 14];
  for (std::size_t count; (count = std::fread(part, 1, sizeof part, file.get())) > 0;) {
    bytes.insert(bytes.end(), part, part + count);
  }
  if (std::ferror(file.get())) fail("cannot be read");
  return bytes;
}

}  // namespace llmdpd
