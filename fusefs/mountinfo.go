// The kernel's table of mounts.

package fusefs

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// fsType is what the tree's mounts are called in the mount table.
const fsType = "fuse.blksnap"

// mount is a line of the mount table.
type mount struct {
	dev    string // MAJOR:MINOR
	dir    string
	fsType string
}

// mountAt returns the topmost mount on dir, and false if nothing is mounted
// there. Unlike a stat of dir it cannot hang on a mount that is dead. dir is
// absolute and without symbolic links.
func mountAt(dir string) (mount, bool, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mount{}, false, fmt.Errorf("read the mount table: %w", err)
	}
	var top mount
	found := false
	for line := range strings.Lines(string(table)) {
		if m, ok := parseMount(line); ok && m.dir == dir {
			top, found = m, true // later ones lie over earlier ones
		}
	}
	return top, found, nil
}

// parseMount reads a line of /proc/PID/mountinfo, see proc_pid_mountinfo(5):
//
//	36 35 98:0 /root /dir rw,noatime master:1 - fuse.blksnap blksnap rw
func parseMount(line string) (mount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	own, super := strings.Fields(before), strings.Fields(after)
	if !ok || len(own) < 5 || len(super) < 1 {
		return mount{}, false
	}
	return mount{dev: own[2], dir: unescape(own[4]), fsType: super[0]}, true
}

// unescape undoes the kernel's escaping of space, tab, newline and backslash as
// a backslash and three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
