// Errors on their way to a client.

package intercept

import (
	"errors"
	"io/fs"
	"syscall"
)

// refusal is an error that the server itself finds: what it says to the client
// and the errno that it counts as.
type refusal struct {
	text  string
	errno syscall.Errno
}

func (r *refusal) Error() string { return r.text }

func (r *refusal) Unwrap() error { return r.errno }

// wireErrno returns the NBD error value that tells a client about err, the
// outcome of q. What has no value of its own becomes EIO; the client cannot do
// more about it anyway.
func wireErrno(q *request, err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return NBD_EPERM
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return NBD_ENOSPC
	case errors.Is(err, syscall.ENOMEM):
		return NBD_ENOMEM
	case errors.Is(err, syscall.EINVAL):
		return NBD_EINVAL
	case errors.Is(err, syscall.EOVERFLOW):
		return NBD_EOVERFLOW
	case errors.Is(err, syscall.ESHUTDOWN):
		return NBD_ESHUTDOWN
	case errors.Is(err, syscall.ENOTSUP):
		// "If NBD_CMD_FLAG_FAST_ZERO is not set, then the server MUST NOT
		// fail with NBD_ENOTSUP."
		if q.typ == NBD_CMD_WRITE_ZEROES && q.flags&NBD_CMD_FLAG_FAST_ZERO != 0 {
			return NBD_ENOTSUP
		}
		return NBD_EINVAL
	}
	return NBD_EIO
}
