package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// found returns the names of the signatures in a file.
func found(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for s, err := range signatures(f, info.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// TestSignaturesOfPrograms looks at what the programs themselves make.
func TestSignaturesOfPrograms(t *testing.T) {
	for _, tc := range []struct {
		want    string
		program []string
	}{
		{"ext2, ext3 or ext4", []string{"mkfs.ext4", "-q"}},
		{"ext2, ext3 or ext4", []string{"mkfs.ext2", "-q"}},
		{"XFS", []string{"mkfs.xfs", "-q"}},
		{"btrfs", []string{"mkfs.btrfs", "-q"}},
		{"swap", []string{"mkswap", "-q"}},
	} {
		t.Run(tc.program[0], func(t *testing.T) {
			path := sparseFile(t, t.TempDir(), 512<<20)
			if got := found(t, path); got != "" {
				t.Errorf("signatures of an empty device\n got %s\nwant none", got)
			}
			run(t, tc.program[0], append(tc.program[1:], path)...)
			if got := found(t, path); !strings.HasPrefix(got, tc.want) {
				t.Errorf("signatures\n got %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestSignatures writes each one that is known, on devices of several sizes.
func TestSignatures(t *testing.T) {
	for _, size := range []int64{1 << 20, 1<<20 + 512, 3<<30 + 4096} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for i, s := range append(known, mdAtEnd(size)...) {
				if s.name == "ZFS" && i%100 != 0 {
					continue // a thousand places, all alike
				}
				if s.off < 0 {
					s.off += size
				}
				if err := f.Truncate(0); err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte(s.magic), s.off); err != nil {
					t.Fatal(err)
				}
				if err := f.Truncate(size); err != nil {
					t.Fatal(err)
				}
				if got := found(t, path); !strings.Contains(got, s.name) {
					t.Errorf("signature at %d of %d\n got %s\nwant %s", s.off, size, got, s.name)
				}
			}
		})
	}
}
