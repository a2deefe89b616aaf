// The directories since/: which lists of changes there are, and making them.

package fusefs

import (
	"iter"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// since returns an item for the directory of all NUMs of changes. It lists the
// numbers of existing snapshots; all that changes answers for can be looked up.
func since(tr traits, tracking func() Tracking, changes func() Changes) item {
	file := tr.as(syscall.S_IFREG, 0)
	d := &dir{node: node{traits: tr.as(syscall.S_IFDIR, always)}}
	d.list = func() []fuse.DirEntry {
		names := []fuse.DirEntry{{Name: "all", Mode: file.kind}}
		for _, num := range tracking().Numbers() {
			names = append(names, fuse.DirEntry{Name: strconv.FormatUint(num, 10), Mode: file.kind})
		}
		return names
	}
	d.find = func(name string) entry {
		runs, ok := runsOf(name, tracking(), changes)
		if !ok {
			return nil
		}
		return &madeFile{node: node{traits: file}, maker: sinceMaker{tr.tree, runs}, perm: textPerm}
	}
	return item{"since", syscall.S_IFDIR, func() entry { return d }}
}

// runsOf returns what reads the runs of the file called name, and whether there
// is such a file now.
func runsOf(name string, now Tracking, changes func() Changes) (func() (iter.Seq2[Run, error], error), bool) {
	if name == "all" {
		return func() (iter.Seq2[Run, error], error) { return changes().All(), nil }, true
	}
	return numOf(name, now, changes)
}

// numOf is runsOf for a number.
func numOf(name string, now Tracking, changes func() Changes) (func() (iter.Seq2[Run, error], error), bool) {
	num, ok := parseNum(name)
	if !ok || num < now.Base() || num > now.Number() {
		return nil, false
	}
	return func() (iter.Seq2[Run, error], error) {
		runs, ok := changes().Since(num)
		if !ok {
			return nil, syscall.ENOENT // the base moved up in the meantime
		}
		return runs, nil
	}, true
}

// parseNum returns the number that name is the decimal form of: no sign, no
// leading zero.
func parseNum(name string) (uint64, bool) {
	num, err := strconv.ParseUint(name, 10, 64)
	return num, err == nil && strconv.FormatUint(num, 10) == name
}

// sinceMaker makes the text of a list of changes.
type sinceMaker struct {
	tree *Tree
	runs func() (iter.Seq2[Run, error], error)
}

func (m sinceMaker) measure() (edition, error) {
	runs, err := m.runs()
	if err != nil {
		return edition{}, err
	}
	return measure(runs)
}

func (m sinceMaker) fill() (content, edition, error) {
	runs, err := m.runs()
	if err != nil {
		return nil, edition{}, err
	}
	t, e, err := m.tree.contents.fill(runs)
	if err != nil {
		return nil, edition{}, err
	}
	return t, e, nil
}
