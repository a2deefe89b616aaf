// Names of devices and snapshots: their grammar, and what they are by default.

package control

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// maxName is the length of the longest name, in bytes: `device@snapshot` and
// `snapshot/device.qcow2` then fit wherever a name of a file or an export does.
const maxName = 64

// latest is the tree's symbolic link to the newest snapshot, so nothing else
// may be called that.
const latest = "latest"

// checkName refuses what is not a NAME: a letter or digit, then up to 63
// letters, digits, dots, underscores and dashes, and not `latest`. what says
// what the name is for, in the error (EINVAL).
func checkName(what, name string) error {
	switch {
	case name == "":
		return refuse(syscall.EINVAL, "a %s's name must not be empty", what)
	case name == latest:
		return refuse(syscall.EINVAL, "%s name %q is reserved", what, name)
	case !isName(name):
		return refuse(syscall.EINVAL, "%s name %q is not a letter or digit and up to %d of A-Z a-z 0-9 . _ -",
			what, clip(name), maxName-1)
	}
	return nil
}

// isName says whether s has a name's form. It may still be reserved.
func isName(s string) bool {
	if s == "" || len(s) > maxName || !isAlnum(s[0]) {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return r > 0x7f || !isAlnum(byte(r)) && !strings.ContainsRune("._-", r)
	}) < 0
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// splitOrigin takes [NAME=]ORIGIN apart. What stands before the first = counts
// only if it has a name's form: /a=b/disk.img is a path. Without a name the
// device is called by the base name of its origin without the last extension.
func splitOrigin(arg string) (name, origin string, err error) {
	before, after, ok := strings.Cut(arg, "=")
	switch {
	case ok && isName(before):
		name, origin = before, after
	case ok && before == "":
		return "", "", refuse(syscall.EINVAL, "origin %q: the name before the = is empty: write NAME%s", clip(arg), clip(arg))
	default:
		origin = arg
		base := filepath.Base(origin)
		name = strings.TrimSuffix(base, filepath.Ext(base))
		if !isName(name) || name == latest {
			return "", "", refuse(syscall.EINVAL, "origin %q gives no device name: write NAME=%s", clip(arg), clip(arg))
		}
	}
	if origin == "" {
		return "", "", refuse(syscall.EINVAL, "device %s: the origin's path is empty", name)
	}
	if err := checkName("device", name); err != nil {
		return "", "", err
	}
	if origin, err = filepath.Abs(origin); err != nil {
		return "", "", fmt.Errorf("find origin of device %s: %w", name, err)
	}
	return name, origin, nil
}

// timeName is what a snapshot taken at t is called by default: its time in UTC,
// and from the second with that name on a number as well.
func timeName(t time.Time, taken func(name string) bool) string {
	base := t.UTC().Format("20060102T150405Z")
	name := base
	for i := 2; taken(name); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name
}
