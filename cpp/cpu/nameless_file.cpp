#include "nameless_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>

namespace qlora::cpu {
namespace {

constexpr Status kNoRoom{StatusCode::out_of_memory, "there is not enough space on its disk"};

Status failed(int error) {
  errno = error;
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return kNoRoom;
    case EFBIG:
      return {StatusCode::out_of_memory, "its file system holds no file of that size"};
    case ENOENT:
      return {StatusCode::invalid_argument, "there is no such directory"};
    case ENOTDIR:
      return {StatusCode::invalid_argument, "it is not a directory"};
    case EACCES:
    case EPERM:
      return {StatusCode::invalid_argument, "this user may not write there"};
    case EROFS:
      return {StatusCode::invalid_argument, "its file system is read-only"};
    case EMFILE:
    case ENFILE:
      return {StatusCode::out_of_memory, "too many files are open"};
    case ENAMETOOLONG:
      return {StatusCode::invalid_argument, "its name is too long"};
    default:
      return {StatusCode::device, "the system made no file there"};
  }
}

// Without a name from the start; where the file system knows no such files, with one for a moment.
int open_in(const std::string& directory) {
  int file = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return file;
  std::string name = directory + "/qlora_native.XXXXXX";
  file = ::mkostemp(name.data(), O_CLOEXEC);
  if (file >= 0) ::unlink(name.c_str());
  return file;
}

Status check_room(int file, std::int64_t bytes) {
  struct statfs about{};
  if (::fstatfs(file, &about) != 0) return failed(errno);
  if (about.f_type == TMPFS_MAGIC || about.f_type == RAMFS_MAGIC ||
      about.f_type == HUGETLBFS_MAGIC) {
    errno = EINVAL;
    return {StatusCode::invalid_argument,
            "its file system is memory itself (tmpfs): name a directory on a disk"};
  }
  // Asked first: reserving would fill up the disk before it failed.
  if (bytes / about.f_bsize >= static_cast<std::int64_t>(about.f_bavail)) return failed(ENOSPC);
  rlimit limit{};  // past it comes a signal, in place of an error
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && static_cast<rlim_t>(bytes) > limit.rlim_cur) {
    return failed(EFBIG);
  }
  // Where a write goes to a new place, the old one that was reserved is of no use.
  if (about.f_type == BTRFS_SUPER_MAGIC) {
    int flags = FS_NOCOW_FL;
    if (::ioctl(file, FS_IOC_SETFLAGS, &flags) != 0) return failed(errno);
  }
  return {};
}

// Some systems' own file systems, /proc for one, say of a new file that it is not there.
Status not_opened(int error, const char* directory) {
  struct stat about{};
  if (error == ENOENT && ::stat(directory, &about) == 0) {
    errno = EOPNOTSUPP;
    return {StatusCode::unsupported, "its file system takes no new files"};
  }
  return failed(error);
}

Status reserve(int file, std::int64_t bytes) {
  if (Status status = check_room(file, bytes); !status.ok()) return status;
  int error = EINTR;
  while (error == EINTR) error = ::posix_fallocate(file, 0, bytes);
  return error == 0 ? Status{} : failed(error);
}

}  // namespace

Status open_nameless_file(const char* directory, std::int64_t bytes, int* descriptor) {
  if (directory == nullptr) directory = std::getenv("TMPDIR");
  if (directory == nullptr || *directory == '\0') directory = "/var/tmp";
  const int file = open_in(directory);
  if (file < 0) return not_opened(errno, directory);
  if (Status status = reserve(file, bytes); !status.ok()) {
    const int error = errno;
    ::close(file);
    errno = error;
    return status;
  }
  *descriptor = file;
  return {};
}

}  // namespace qlora::cpu
