// How much memory there is.

package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// defaultMemLimit is a quarter of the memory that the machine has, or that the
// process may use.
func defaultMemLimit() (int64, error) {
	total, err := memInfo("MemTotal")
	if err != nil {
		return 0, err
	}
	return max(min(total, cgroupLimit("/proc/self/cgroup", "/sys/fs/cgroup", total))/4/SlotSize, 1) * SlotSize, nil
}

// memInfo returns a field of /proc/meminfo in bytes.
func memInfo(field string) (int64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("ask for memory: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == field+":" {
			kib, err := strconv.ParseInt(f[1], 10, 53)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("ask for memory: /proc/meminfo has no %s", field)
}

// cgroupLimit is the least memory.max under root of the control groups (version
// 2) that the file self names, or limit if that is less or nothing is known.
func cgroupLimit(self, root string, limit int64) int64 {
	text, err := os.ReadFile(self)
	if err != nil {
		return limit
	}
	_, group, _ := strings.Cut(string(text), "0::")
	group, _, _ = strings.Cut(group, "\n")
	for dir := filepath.Join("/", group); ; dir = filepath.Dir(dir) {
		// Without a limit it says "max", which is no number.
		text, err := os.ReadFile(filepath.Join(root, dir, "memory.max"))
		if n, bad := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && bad == nil {
			limit = min(limit, n)
		}
		if dir == "/" {
			return limit
		}
	}
}
