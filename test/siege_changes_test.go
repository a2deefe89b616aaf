// What must be true of the change tracking of a daemon that was killed.

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// surveyChanges checks that no increment misses anything: from each copy of an
// image that there is to what the device and each later image hold.
func (s *siege) surveyChanges() {
	s.t.Helper()
	for name, k := range s.devices {
		copies := slices.Clone(k.copies)
		for _, sn := range s.snapshots {
			if i := sn.images[name]; i != nil && i.noted != nil && !sn.lost {
				copies = append(copies, copied{i.number, i.now})
			}
		}
		for _, c := range copies {
			if err := s.surveyIncrement(k, s.d.device(name, "cbt"), c, k.now); err != nil {
				s.t.Error(err)
			}
			for _, sn := range s.snapshots {
				i := sn.images[name]
				if i == nil || i.noted == nil || sn.lost || i.number <= c.number || i.number <= k.reset {
					continue
				}
				if err := s.surveyIncrement(k, s.d.snapshot(sn.name, name+".cbt"), c, i.now); err != nil && !sn.mayBeGone() {
					s.t.Errorf("image of %s: %v", sn.name, err)
				}
			}
		}
		if err := s.surveyNumbers(k); err != nil {
			s.t.Error(err)
		}
	}
}

// surveyIncrement checks that a copy becomes now by what the changes in dir say.
func (s *siege) surveyIncrement(k *target, dir string, c copied, now []byte) error {
	if c.number <= k.reset {
		if path := filepath.Join(dir, "since", fmt.Sprint(c.number)); exists(path) {
			return fmt.Errorf("%s, of an earlier generation, exists", path)
		}
		return nil
	}
	text, err := os.ReadFile(filepath.Join(dir, "since", fmt.Sprint(c.number)))
	if base := uint64(readNumber(s.t, filepath.Join(dir, "base"))); errors.Is(err, os.ErrNotExist) && c.number < base {
		return nil // a full read is due
	}
	if err != nil {
		return err
	}
	// What the copy is too short for must be in the increment.
	got := append([]byte(nil), c.content[:min(len(c.content), len(now))]...)
	for len(got) < len(now) {
		got = append(got, 0xff)
	}
	for line := range strings.Lines(string(text)) {
		var off, n int64
		var kind string
		if _, err := fmt.Sscan(line, &off, &n, &kind); err != nil || off+n > int64(len(now)) {
			return fmt.Errorf("%s since %d: line %q of a device of %d bytes: %v", k.name, c.number, line, len(now), err)
		}
		if kind == "zero" {
			clear(got[off : off+n])
		} else {
			copy(got[off:off+n], now[off:])
		}
	}
	if err := explain(k.name, got, now, 0); err != nil {
		return fmt.Errorf("the increment since %d is not all: %w", c.number, err)
	}
	return nil
}

// surveyNumbers checks that numbers go on, and that what was marked by hand is.
func (s *siege) surveyNumbers(k *target) error {
	var f deviceFacts
	s.get("/devices/"+k.name, &f)
	if f.CBT.Number < k.number {
		return fmt.Errorf("the number of %s is %d, after %d was given", k.name, f.CBT.Number, k.number)
	}
	k.number = f.CBT.Number
	for _, m := range k.marks {
		if m.number < f.CBT.Base {
			continue
		}
		text := read(s.t, s.d.device(k.name, "cbt", "since", fmt.Sprint(m.number)))
		if end := min(m.off+m.n, f.Size); m.off < end && !covered(text, m.off, end) {
			return fmt.Errorf("%s: %d:%d was marked after snapshot %d, and is not in\n%s", k.name, m.off, m.n, m.number, text)
		}
	}
	return nil
}

// covered says whether [off, end) is in the lines of a list of changes.
func covered(text string, off, end int64) bool {
	for line := range strings.Lines(text) {
		var at, n int64
		fmt.Sscan(line, &at, &n)
		if at <= off && off < at+n {
			off = at + n
		}
	}
	return off >= end
}
