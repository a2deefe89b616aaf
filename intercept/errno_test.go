package intercept

import (
	"errors"
	"syscall"
	"testing"
)

func TestWireErrno(t *testing.T) {
	zero := &request{typ: NBD_CMD_WRITE_ZEROES}
	fast := &request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_FAST_ZERO}
	for _, tc := range []struct {
		name string
		q    *request
		err  error
		want uint32
	}{
		{"nil", zero, nil, 0},
		{"EPERM", zero, syscall.EPERM, NBD_EPERM},
		{"EACCES", zero, syscall.EACCES, NBD_EPERM},
		{"EROFS", zero, syscall.EROFS, NBD_EPERM},
		{"EIO", zero, syscall.EIO, NBD_EIO},
		{"ENOMEM", zero, syscall.ENOMEM, NBD_ENOMEM},
		{"EINVAL", zero, syscall.EINVAL, NBD_EINVAL},
		{"ENOSPC", zero, syscall.ENOSPC, NBD_ENOSPC},
		{"EDQUOT", zero, syscall.EDQUOT, NBD_ENOSPC},
		{"EFBIG", zero, syscall.EFBIG, NBD_ENOSPC},
		{"EOVERFLOW", zero, syscall.EOVERFLOW, NBD_EOVERFLOW},
		{"ESHUTDOWN", zero, syscall.ESHUTDOWN, NBD_ESHUTDOWN},
		{"ENOTSUP where it may be said", fast, syscall.ENOTSUP, NBD_ENOTSUP},
		{"ENOTSUP where it must not", zero, syscall.ENOTSUP, NBD_EINVAL},
		{"wrapped", zero, errors.Join(errors.New("write slot"), syscall.ENOSPC), NBD_ENOSPC},
		{"unknown", zero, errors.New("no idea"), NBD_EIO},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := wireErrno(tc.q, tc.err); got != tc.want {
				t.Errorf("wireErrno(%v)\n got %d\nwant %d", tc.err, got, tc.want)
			}
		})
	}
}
