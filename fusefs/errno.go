// How errors cross the border to the kernel.

package fusefs

import (
	"errors"
	"log/slog"
	"syscall"
)

// passed are the error numbers that mean the same to a program that uses the
// tree as they do to us. Any other error is EIO: an ENOENT that an origin
// answered must not look as if a file of the tree did not exist.
var passed = []syscall.Errno{
	syscall.EBUSY,
	syscall.EEXIST,
	syscall.EINVAL,
	syscall.EIO,
	syscall.ENOENT,
	syscall.ENOMEM,
	syscall.ENOSPC,
	syscall.ENXIO,
	syscall.EOPNOTSUPP,
	syscall.EPERM,
	syscall.EROFS,
	syscall.ETIMEDOUT,
}

// errno returns the error number that tells the kernel about err, which came
// from the Source while doing op on name. An error number says less than err,
// so err goes to the debug log.
func (t *Tree) errno(op, name string, err error) syscall.Errno {
	if err == nil {
		return 0
	}
	t.log.Debug("request failed", slog.String("op", op), slog.String("file", name), slog.Any("err", err))
	for _, e := range passed {
		if errors.Is(err, e) {
			return e
		}
	}
	return syscall.EIO
}
